"""Measures cascades: `python -m benchmarks.cascade WORK` on photographs, `... simulate` on known networks.

The thresholds are fitted on one half of the 300 photographs of ../shared/data/imagenet. The other half is classified
with each network alone and with the cascade, each photograph eight times for a longer measurement. Every photograph is
of another class, so that all labels share one threshold. Accuracy, rows by network and CPU time by stage are printed
as JSON. CPU time depends less on other programs than duration.

`simulate` draws predictions of a small network whose probability of an error is known, with a large network that is
always right, and compares the fitted thresholds with the best ones.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.evaluation.cascade_thresholds import PairedRows, fit_cascade

_SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
_REPEATS = 8
_ENGINE = ("--engine", "openvino", "--precision", "fp32")
_IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
_HALF = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--model-args", "pad_type=same")
_NETWORKS = {
    "squeezenet1_1": ("torchvision:squeezenet1_1", "squeezenet1_1", 224, _IMAGENET),
    "mobilenetv2_100-128": ("timm:mobilenetv2_100", "mobilenetv2_100", 128, _HALF),
    "mobilenetv2_100": ("timm:mobilenetv2_100", "mobilenetv2_100", 224, _HALF),
}
_DRAWS = 30
_SIMULATED_LOSS = 0.01
_BOUNDS = ("0.005", "0.02")


def _job(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"batchcls.jobs.{name}", *arguments], check=True, text=True)


def _write_inputs(work: Path) -> None:
    """Write the labels, one labeled manifest, and one that repeats the other photographs."""
    images = _SHARED / "data/imagenet"
    # Two classes are named crane, so that the labels are the ids of WordNet.
    with (images / "classes.csv").open(encoding="utf-8") as file:
        labels = [row["wnid"] for row in csv.DictReader(file)]
    (work / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    files = sorted(images.glob("*.JPEG"))
    for name, half, repeats in (("fit", files[::2], 1), ("test", files[1::2], _REPEATS)):
        rows = [(path, number) for number in range(repeats) for path in half]
        table = {
            "item_id": [f"{path.stem}-{number}" for path, number in rows],
            "uri": [str(path) for path, _ in rows],
            ("label" if name == "fit" else "true_label"): [path.name.partition("_")[0] for path, _ in rows],
        }
        pq.write_table(pa.table(table), work / f"{name}.parquet")


def _create_bundle(work: Path, name: str) -> str:
    architecture, weights, size, more = _NETWORKS[name]
    folder = str(work / name)
    if (work / name / "bundle.json").exists():
        return folder
    _job(
        "bundle",
        *("create", "--model", architecture, "--weights", str(_SHARED / f"weights/{weights}.safetensors")),
        *("--labels", str(work / "labels.txt"), "--input-size", str(size), "--crop-pct", "0.875"),
        *("--interpolation", "bilinear", *more, "--output", folder),
    )
    return folder


def _classify(work: Path, run_id: str, *arguments: str) -> dict[str, Any]:
    """Classify the test photographs and summarize the run."""
    output = work / "runs" / run_id
    if not (output / "runs" / "run" / "run.json").exists():
        _job(
            "classify",
            *("--manifest", str(work / "test.parquet"), "--output", str(output), "--run-id", "run"),
            *("--keep", "true_label", "--reuse", "none", "--no-report", *_ENGINE),
            *("--no-publish", "--no-share-predictions", "--ray-address", "local", *arguments),
        )
    folder = output / "runs" / "run"
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    rows = pq.read_table(folder / "predictions")
    correct = [
        label == truth
        for label, truth in zip(
            rows.column("label").to_pylist(), rows.column("true_label").to_pylist(), strict=True
        )
    ]
    counts = record["counts"]
    return {
        "run": run_id,
        "rows": rows.num_rows,
        "accuracy": round(sum(correct) / len(correct), 4),
        "by_network": counts["by_network"],
        "ms_per_image": {
            stage: round(1000 * seconds / counts["rows"], 2)
            for stage, seconds in record["stage_seconds"].items()
        },
    }


def _simulate(rows: int, categories: int, confidence: float) -> dict[str, Any]:
    """Fit thresholds to draws in which half of the categories are wrong with the probability 1 - p, others less often.

    Probabilities p are uniform. With a threshold t, a share of 1 - t of the rows of a category is kept, and a share of
    w * (1 - t)^2 / 2 is lost, where w is 1 or a quarter. In the optimum, w * (1 - t) is the same in all categories.
    """
    weight = np.where(np.arange(categories) % 2 == 0, 1.0, 0.25)
    best = float((np.sqrt(2 * _SIMULATED_LOSS / (1 / weight).mean()) / weight).mean())
    kept, lost = [], []
    for seed in range(_DRAWS):
        random = np.random.default_rng(seed)
        predicted = random.integers(0, categories, rows).astype(np.int32)
        probability = random.uniform(0, 1, rows).astype(np.float32)
        small = random.uniform(0, 1, rows) >= weight[predicted] * (1 - probability)
        paired = PairedRows(predicted, probability, small, np.ones(rows, bool), categories)
        limits = fit_cascade(paired, _SIMULATED_LOSS, confidence).by_category.astype(np.float64)
        shares = np.clip(1 - limits, 0, 1)
        kept.append(shares.mean())
        lost.append((weight * shares**2 / 2).mean())
    return {
        "rows": rows,
        "categories": categories,
        "confidence": confidence,
        "kept": round(float(np.mean(kept)), 3),
        "best": round(best, 3),
        "loss_mean": round(float(np.mean(lost)), 4),
        "loss_max": round(float(np.max(lost)), 4),
        "draws_above_bound": round(float((np.array(lost) > _SIMULATED_LOSS).mean()), 2),
    }


def main() -> None:
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="Folder for bundles, manifests and runs; or `simulate`.")
    work = parser.parse_args().work
    if str(work) == "simulate":
        for rows, categories in ((1000, 10), (5000, 10), (20_000, 10)):
            for confidence in (0.95, 0.0):
                print(json.dumps(_simulate(rows, categories, confidence)), flush=True)
        return
    work.mkdir(parents=True, exist_ok=True)
    _write_inputs(work)
    bundles = {name: _create_bundle(work, name) for name in _NETWORKS}
    large = "mobilenetv2_100"
    for name, bundle in bundles.items():
        print(json.dumps(_classify(work, f"{name}-alone", "--model", bundle)), flush=True)
    for small in (name for name in bundles if name != large):
        for loss in _BOUNDS:
            key = f"{small}-{loss}"
            fitted, evaluated = str(work / f"{key}-bundle"), work / f"{key}-evaluated"
            if not (evaluated / "cascade.json").exists():
                _job(
                    "evaluate",
                    *(
                        "--manifest",
                        str(work / "fit.parquet"),
                        "--model",
                        f"{bundles[small]},{bundles[large]}",
                    ),
                    *("--cascade", "--max-accuracy-loss", loss, "--accuracy-loss-confidence", "0"),
                    *("--output", str(evaluated), "--write-bundle", fitted, *_ENGINE),
                )
            record = json.loads((evaluated / "cascade.json").read_text(encoding="utf-8"))
            print(
                json.dumps(
                    {"evaluated": key} | {name: record[name] for name in record if name != "settings"}
                ),
                flush=True,
            )
            model = ("--model", f"{fitted},{bundles[large]}", "--cascade", "auto")
            print(json.dumps(_classify(work, key, *model)), flush=True)


if __name__ == "__main__":
    main()
