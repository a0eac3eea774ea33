"""Measures nights in which only a part of the model changed: `python -m benchmarks.reused_layers nights|rows WORK`.

`nights` classifies the photographs of ../shared/data/catalog with mobilenetv2_100. It then renames a label and merges
two with label maps, fits new thresholds, trains a new linear head and adds a category, and runs a night for each,
while every byte of every photograph is zero (size and time of the files are those of the photographs). Each night is
compared row by row with a full run. A run whose record exists is not repeated. `rows` predicts 100,000 and 1,000,000
synthetic rows from their embeddings. Times, memory and differences are printed as JSON. Other arguments, such as
`--limit 300`, are passed to `classify`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from batchcls.config.classify_config import ClassifyConfig
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.inference.golden_record import with_golden
from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.snapshot import open_manifest
from batchcls.models.classifier_head import ClassifierHead, layers_of
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.pipeline.copy_predictions import CopySpec, copy_fragment
from batchcls.pipeline.pipeline_spec import LoadSpec
from batchcls.pipeline.stored_predictions import StoredPredictions
from batchcls.preprocessing import Views
from batchcls.runs import stored_heads
from batchcls.runs.catalog import read_record
from batchcls.runs.commit import commit, reconcile
from batchcls.runs.parts import PartWriter
from batchcls.runs.paths import run_folder
from batchcls.runs.plan import Fingerprints, Plan, ReuseMethod, create_plan, prediction_settings
from batchcls.runs.receipts import write_receipt
from batchcls.runs.records import Findings, ManifestInfo, ModelInfo
from batchcls.runs.reuse import open_reuse_source
from batchcls.storage.filesystem import Storage
from batchcls.storage.uris import canonical_location

_SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
_STORAGE = Storage()


def _job(name: str, *arguments: str) -> float:
    """Run a job in a separate process and return its duration in seconds; it writes its log to stderr."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"batchcls.jobs.{name}", *arguments], check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name} {' '.join(arguments)} ended with {done.returncode}")
    return round(time.perf_counter() - started, 1)


def _make_bundle(work: Path) -> str:
    labels, folder = work / "labels.txt", str(work / "bundle")
    if (work / "bundle/bundle.json").exists():
        return folder
    rows = (_SHARED / "data/imagenet/classes.csv").read_text(encoding="utf-8").splitlines()[1:]
    labels.write_text("".join(f"{row.split(',')[1]}\n" for row in rows), encoding="utf-8")
    _job(
        "bundle",
        *("create", "--model", "timm:mobilenetv2_100", "--model-args", "pad_type=same"),
        *("--weights", str(_SHARED / "weights/mobilenetv2_100.safetensors"), "--labels", str(labels)),
        *("--input-size", "224", "--crop-pct", "0.875", "--interpolation", "bilinear"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--output", folder),
    )
    return folder


def _label_map(work: Path, name: str, text: str) -> tuple[str, str]:
    """Write a label map, and return the arguments of `classify` that apply it."""
    path = work / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return "--label-map", str(path)


def _with_thresholds(work: Path, bundle: str, predictions: pa.Table, photographs: Path) -> str:
    """Fit temperature and thresholds to 1,000 rows, of which every fifth is labeled with the second-best class."""
    rows = predictions.select(["uri", "item_id", "top_k"]).slice(0, 1000).to_pylist()
    best = [row["top_k"][1 if number % 5 == 0 else 0]["label"] for number, row in enumerate(rows)]
    labeled = pa.table(
        {
            "item_id": [row["item_id"] for row in rows],
            "uri": [str(photographs / row["uri"]) for row in rows],
            "label": best,
        }
    )
    pq.write_table(labeled, work / "labeled.parquet")
    made = f"{bundle}-calibrated"
    _job(
        "evaluate",
        *("--model", bundle, "--manifest", str(work / "labeled.parquet")),
        *("--output", str(work / "evaluation"), "--write-bundle", made, "--target-precision", "0.8"),
    )
    return made


def _with_new_head(work: Path, bundle: str) -> str:
    made = f"{bundle}-probe"
    if Path(made, "bundle.json").exists():
        return made
    for part in ("train", "validation"):
        _job(
            "manifest",
            *("from-folder", str(_SHARED / "data/catalog" / part), "--labels-from-folders"),
            *("--output", str(work / f"{part}.parquet")),
        )
    _job(
        "finetune",
        *("--recipe", "linear-probe", "--model", bundle, "--manifest", str(work / "train.parquet")),
        *("--validation", str(work / "validation.parquet"), "--output", made),
    )
    return made


def _with_new_category(work: Path, bundle: str, photographs: Path, run: str) -> str:
    """Add a category to the bundle from 20 of its images and the embeddings of `run`."""
    made, images = f"{bundle}-extended", work / "dresses"
    if Path(made, "bundle.json").exists():
        return made
    images.mkdir(exist_ok=True)
    for path in sorted((photographs / "train/dress").iterdir())[:20]:
        shutil.copy(path, images)
    _job(
        "bundle",
        *("extend", bundle, "--category", "dress", "--images", str(images), "--run", run),
        *("--output", made),
    )
    return made


@contextlib.contextmanager
def _blanked(folder: Path) -> Iterator[None]:
    """While the block runs, all photographs consist of zeros, with the same size and time."""
    files = {path: (path.read_bytes(), path.stat()) for path in folder.rglob("*.jpg")}

    def write(path: Path, data: bytes, stat: os.stat_result) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    for path, (data, stat) in files.items():
        write(path, bytes(len(data)), stat)
    try:
        yield
    finally:
        for path, (data, stat) in files.items():
            write(path, data, stat)


def _predictions(output: Path, run_id: str) -> pa.Table:
    return pq.read_table(output / "runs" / run_id / "predictions").sort_by("row")


def _compare(found: pa.Table, full: pa.Table) -> dict[str, Any]:
    """Compare the predictions of two runs over the same rows."""
    classes = [
        pc.struct_field(pc.list_element(t.column("top_k").combine_chunks(), 0), "class_index")
        for t in (found, full)
    ]
    difference = np.abs(found.column("probability").to_numpy() - full.column("probability").to_numpy())
    return {
        "rows": full.num_rows,
        "same_rows": found.column("item_id").equals(full.column("item_id")),
        "top1_agreement": float(np.mean(classes[0].to_numpy() == classes[1].to_numpy())),
        "labels_equal": int(
            pc.sum(pc.equal(found.column("label").fill_null(""), full.column("label").fill_null(""))).as_py()
        ),
        "max_probability_difference": float(difference.max()),
        "mean_probability_difference": float(difference.mean()),
        "embeddings_equal": found.column("embedding").equals(full.column("embedding")),
    }


def nights(work: Path, engine: list[str], only: list[str]) -> None:
    """Run the first night, and a partial and a full one for each change of the model, or for those in `only`."""
    photographs, output = work / "photographs", work / "output"
    if not photographs.exists():
        shutil.copytree(_SHARED / "data/catalog", photographs)
    catalog = str(work / "catalog.parquet")
    if not Path(catalog).exists():
        _job("manifest", "from-folder", str(photographs), "--output", catalog)
    bundle = _make_bundle(work)

    def night(run_id: str, model: str, reuse: str, *more: str) -> dict[str, Any]:
        seconds = None
        if not (output / "runs" / run_id / "run.json").exists():
            seconds = _job(
                "classify",
                *("--manifest", catalog, "--model", model, "--output", str(output), "--run-id", run_id),
                *("--reuse", reuse, "--no-report", "--ray-address", "local", *engine, *more),
            )
        record = json.loads((output / "runs" / run_id / "run.json").read_text(encoding="utf-8"))
        plan = json.loads((output / "runs" / run_id / "plan.json").read_text(encoding="utf-8"))
        found = {
            "run": run_id,
            "seconds": seconds,
            "seconds_total": record["measurements"]["seconds_total"],
            "counts": record["counts"],
            "image_bytes": record["image_bytes"],
            "stage_seconds": record["stage_seconds"],
            "reuse": plan["reuse"],
            "precisions": plan["result_settings"]["precisions"],
        }
        print(json.dumps(found), flush=True)
        return found

    night("first", bundle, "none")
    first = _predictions(output, "first")
    counts = Counter(first.column("label").to_pylist()).most_common(3)
    renamed, *merged = (json.dumps(label) for label, _ in counts)  # strings of TOML, too
    steps: dict[str, Callable[[], tuple[str, tuple[str, ...]]]] = {
        "renamed": lambda: (
            bundle,
            _label_map(work, "renamed", f'[rename]\n{renamed} = "renamed label"\n'),
        ),
        "merged": lambda: (
            bundle,
            _label_map(work, "merged", f'[merge]\n"merged label" = [{", ".join(merged)}]\n'),
        ),
        "calibrated": lambda: (_with_thresholds(work, bundle, first, photographs), ("--abstain",)),
        "probe": lambda: (_with_new_head(work, bundle), ()),
        "extended": lambda: (
            _with_new_category(work, bundle, photographs, str(output / "runs/first")),
            (),
        ),
    }
    changes = {name: step() for name, step in steps.items() if name in (only or steps)}
    with _blanked(photographs):
        night("same", bundle, "first")
        for name, (model, more) in changes.items():
            night(name, model, "first", *more)
    for name, (model, more) in changes.items():
        night(f"{name}-full", model, "none", *more)
        compared = _compare(_predictions(output, name), _predictions(output, f"{name}-full"))
        print(json.dumps({"compared": name, **compared}), flush=True)


_TRUNK = "timm:resnet18"  # embeddings of 512
_ROWS_PER_FILE = 16_384


def _synthetic_bundle(work: Path, name: str, seed: int) -> str:
    """A bundle with random weights, with a classifier from `seed` whose logits differ enough to have a best class."""
    folder = str(work / name)
    choices = ModelChoices(overrides=PreprocessingOverrides(input_size=(64, 64)), allow_random=True)
    bundle = with_golden(resolve_model(_TRUNK, choices, _STORAGE))
    state = from_safetensors(bundle.weights, name)
    weight, bias = bundle.config.head_tensors or ()
    generator = torch.Generator().manual_seed(seed)
    state[weight] = torch.randn(state[weight].shape, generator=generator) / 8
    state[bias] = torch.randn(state[bias].shape, generator=generator)
    with_golden(bundle.with_weights(to_safetensors(state))).save(folder, _STORAGE)
    return folder


def _settings(bundle: Bundle) -> PredictSettings:
    return PredictSettings(
        labels=bundle.config.labels,
        top_k=5,
        embedding=pa.float16(),
        embedding_dimension=bundle.config.embedding_dimension,
        l2_normalize=False,
        views=Views(),
        input_shape=bundle.config.preprocessing.shape,
        normalize="engine",
        batch_size=1,
        kept=(),
    )


def _write_source(work: Path, rows: int, model: str) -> str:
    """Commit a run over `rows` rows with random embeddings, and write its manifest; return the URI of the manifest."""
    bundle, output, catalog = (
        Bundle.load(model, _STORAGE),
        str(work / f"output-{rows}"),
        work / f"{rows}.parquet",
    )
    numbers = np.arange(rows)
    texts = {name: pa.array([f"{name}-{n:09d}" for n in numbers]) for name in ("item", "version")}
    uris = pa.array([f"images/{n}.jpg" for n in numbers])
    columns = {"item_id": texts["item"], "uri": uris, "version": texts["version"]}
    pq.write_table(pa.table(columns), catalog, row_group_size=_ROWS_PER_FILE)
    manifest = open_manifest(str(catalog), _STORAGE)
    config = ClassifyConfig(manifest=str(catalog), model=model, output=output)
    head, layers = ClassifierHead.of(bundle), layers_of(bundle)
    assert head is not None
    stored_heads.save(output, head, _STORAGE)
    plan = Plan(
        run_id="source",
        fingerprints=Fingerprints.of(config, manifest.fingerprint, bundle.fingerprint),
        manifest=ManifestInfo(
            fingerprint=manifest.fingerprint, base=canonical_location(manifest.base), rows=rows
        ),
        model=ModelInfo(
            fingerprint=bundle.fingerprint, layers=layers, architecture=_TRUNK, embedding_tap="pooled"
        ),
        result_settings=prediction_settings(config, ["fp32"], None),
    )
    folder = create_plan(plan, output, _STORAGE)
    dimension = bundle.config.embedding_dimension
    predictions = StoredPredictions("rehead", _settings(bundle), head)
    writer = PartWriter(folder, _STORAGE, (), pa.float16(), dimension)
    random = np.random.default_rng(0)
    receipts = []
    for start in range(0, rows, _ROWS_PER_FILE):
        count = min(_ROWS_PER_FILE, rows - start)
        values = np.abs(random.standard_normal((count, dimension), np.float32)).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dimension)
        table, _ = predictions.of(pa.table({"embedding": column}))
        known = {
            "row": pa.array(numbers[start : start + count]),
            "item_id": texts["item"].slice(start, count),
            "uri": uris.slice(start, count),
            "width": pa.array(np.full(count, 400, np.int32)),
            "height": pa.array(np.full(count, 400, np.int32)),
            "content_hash": pa.nulls(count, pa.string()),
            "source_version": pc.binary_join_element_wise(
                "version:", texts["version"].slice(start, count), ""
            ),
        }
        for name, array in known.items():
            table = table.append_column(name, array)
        receipts.append(write_receipt(writer.write_predictions(table, "computed"), folder, _STORAGE))
    commit(plan, receipts, reconcile(receipts, rows), Findings(), _STORAGE, folder)
    return str(catalog)


def _reuse_here(work: Path, count: int, method: ReuseMethod, model: str) -> dict[str, Any]:
    """Derive all predictions in this process, with the code of the copy tasks, and return the cost."""
    output, manifest = work / f"output-{count}", open_manifest(str(work / f"{count}.parquet"), _STORAGE)
    bundle = Bundle.load(model, _STORAGE)
    dimension = bundle.config.embedding_dimension
    started, started_cpu = time.perf_counter(), time.process_time()
    record = read_record(str(output), "source", _STORAGE)
    source = open_reuse_source(record, _STORAGE, same_base=True, same_manifest=False)
    index_seconds = time.process_time() - started_cpu
    load = LoadSettings(
        run_id=method,
        base=manifest.base,
        kept=(),
        fetch=FetchPolicy(),
        limits=DecodeLimits(1_000_000, 8),
        preprocessing=bundle.config.preprocessing,
        views=Views(),
        normalize="engine",
        fetch_threads=1,
        decode_threads=1,
        block_rows=1,
    )
    spec = CopySpec(
        LoadSpec(manifest.columns, _STORAGE, load),
        PartWriter(run_folder(str(output), method), _STORAGE, (), pa.float16(), dimension),
        source,
        StoredPredictions(method, _settings(bundle), ClassifierHead.of(bundle)),
    )
    copied: Counter[str] = Counter()
    for part in manifest.fragments(repeat(_ROWS_PER_FILE)):
        copied += copy_fragment(spec, part, {}).counts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rows": count,
        "method": method,
        "copied": copied,
        "index_cpu_seconds": round(index_seconds, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": round(peak),
    }


def rows(work: Path) -> None:
    """Predict synthetic rows from their embeddings, and copy them for comparison, each in a separate process."""
    source = _synthetic_bundle(work, "source", 1)
    models: dict[ReuseMethod, str] = {"copy": source, "rehead": _synthetic_bundle(work, "other", 2)}
    context = multiprocessing.get_context("spawn")
    for count in (100_000, 1_000_000):
        _write_source(work, count, source)
        for method, model in models.items():
            with context.Pool(1) as pool:
                print(json.dumps(pool.apply(_reuse_here, (work, count, method, model))), flush=True)


def main() -> None:
    """Run the measurement that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["nights", "rows"])
    parser.add_argument("work", type=Path, help="folder for images, bundles and runs")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="renamed, merged, calibrated, probe or extended; default: all",
    )
    arguments, more = parser.parse_known_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "nights":
        nights(arguments.work.resolve(), more, arguments.only)
    else:
        rows(arguments.work.resolve())


if __name__ == "__main__":
    main()
