"""Runs this job and Ray's documented example in turn and writes what they took: `make bench`.

Needs the photographs and weights beside the repository. Both are whole processes; what is compared
is the pipeline's own time (`ray.init` and the imports of the driver excluded), pair by pair, since
these machines are shared and their speed drifts.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
MODELS: dict[str, list[str]] = {
    "mobilenetv2_100": [
        *("--model", "timm:mobilenetv2_100", "--model-args", "pad_type=same", "--interpolation", "bilinear"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"),
    ],
    "squeezenet1_1": ["--model", "torchvision:squeezenet1_1"],
}


def run(*arguments: str) -> str:
    """A Python process's output, or an error with it."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def batchcls_rate(folder: Path, bundle: Path) -> float:
    """Images per second of the main job's pipeline."""
    output = folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    run(
        *(
            "-m",
            "batchcls.jobs.classify",
            "--manifest",
            str(folder / "manifest.parquet"),
            "--model",
            str(bundle),
        ),
        *("--output", str(output), "--ray-address", "local"),
    )
    (record,) = output.glob("runs/*/run.json")
    return float(json.loads(record.read_text())["measured"]["images_per_second"])


def example_rate(folder: Path, model: str, repeats: int) -> float:
    """Images per second of Ray's example."""
    output = folder / "example"
    shutil.rmtree(output, ignore_errors=True)
    weights = SHARED / "weights" / f"{model}.safetensors"
    said = run(
        *("-m", "benchmarks.ray_example", "--images", str(SHARED / "data" / "imagenet"), "--model", model),
        *("--weights", str(weights), "--repeats", str(repeats), "--output", str(output)),
    )
    return float(said.split()[-2])


def measure(model: str, folder: Path, rounds: int, repeats: int) -> dict[str, Any]:
    """Both, in turn, `rounds` times."""
    bundle = folder / model
    weights = SHARED / "weights" / f"{model}.safetensors"
    created = [*MODELS[model], "--weights", str(weights), "--output", str(bundle)]
    run("-m", "batchcls.jobs.bundle", "create", *created)
    ours, theirs = [], []
    for number in range(rounds):
        ours.append(batchcls_rate(folder, bundle))
        theirs.append(example_rate(folder, model, repeats))
        print(
            f"{model} round {number + 1}: batchcls {ours[-1]:.1f}, example {theirs[-1]:.1f} images/s",
            flush=True,
        )
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"batchcls": ours, "ray_example": theirs, "median_of_ratios": round(ratio, 2)}


def main() -> None:
    """Measure and write benchmarks/results/DATE.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4, help="times that the 300 photographs are used")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit("the photographs and weights of ../shared are needed")
    images = sorted((SHARED / "data" / "imagenet").glob("*.JPEG")) * arguments.repeats
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = [str(number) for number in range(len(images))]
        pq.write_table(
            pa.table({"item_id": ids, "uri": [str(path) for path in images]}), folder / "manifest.parquet"
        )
        results = {model: measure(model, folder, arguments.rounds, arguments.repeats) for model in MODELS}
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "images": len(images),
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "images_per_second": results,
    }
    target = HERE / "results" / f"{record['date']}-ray-example.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(target)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()
    )


if __name__ == "__main__":
    main()
