"""Prepares the inputs of the programs in one folder: photographs, weights, bundles and manifests."""

import argparse
import importlib.util
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.contenders import (
    CONTENDERS,
    CONTENDERS_AT_500_PIXELS,
    CONTENDERS_AT_1500_PIXELS,
    JOB,
    Files,
)
from benchmarks.images import choose_images, enlarge_images
from benchmarks.process import note, python

_PREPROCESSING = (
    *("--input-size", "224", "--crop-pct", "0.875", "--interpolation", "bilinear"),
    *("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"),
)
_LARGE_SIDE_PIXELS = 1500


@dataclass(frozen=True, slots=True)
class Suite:
    """One network on one set of photographs, and the programs that are compared on it.

    Attributes:
        title: human-readable name.
        files: input files with all photographs.
        folder: working folder.
        names: programs, including the job.
        counts: number of photographs by kind of program; results for fewer than the job are projected.
        small: number of photographs of the run that separates startup from processing.
    """

    title: str
    files: Files
    folder: Path
    names: tuple[str, ...]
    counts: dict[str, int]
    small: int


def list_images(paths: Iterable[Path], folder: Path, name: str) -> tuple[Path, Path]:
    """Write photographs as a list and as a manifest; returns both files."""
    uris = [str(path) for path in paths]
    image_list, manifest = folder / f"{name}.txt", folder / f"{name}.parquet"
    image_list.write_text("".join(f"{uri}\n" for uri in uris), encoding="utf-8")
    ids = [f"{number:06d}" for number in range(len(uris))]
    pq.write_table(pa.table({"item_id": ids, "uri": uris}), manifest)
    return image_list, manifest


def limit_images(files: Files, count: int) -> Files:
    """Write the same files for the first `count` photographs."""
    paths = [Path(line) for line in files.images.read_text(encoding="utf-8").splitlines()]
    if count >= len(paths):
        return files
    images, manifest = list_images(paths[:count], files.images.parent, f"{files.images.stem}-{count}")
    return replace(files, images=images, manifest=manifest)


def prepare_model(model: str, images: Path, folder: Path) -> tuple[Path, Path, Path]:
    """Create weights, labels and bundle of an architecture; existing ones are reused."""
    weights, labels, bundle = (folder / f"{model}{end}" for end in (".safetensors", ".labels.txt", ""))
    if not labels.exists():
        note(f"{model}: creating weights")
        python(["-m", "benchmarks.weights", *_flags(images=images, model=model, output=weights)], folder)
        flags = _flags(model=f"timm:{model}", weights=weights, output=bundle)
        python(["-m", "batchcls.jobs.bundle", "create", *flags, *_PREPROCESSING], folder)
        record = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
        labels.write_text("".join(f"{label}\n" for label in record["labels"]), encoding="utf-8")
    return weights, labels, bundle


def _flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def plan_suites(arguments: argparse.Namespace, folder: Path) -> list[Suite]:
    """Select and enlarge photographs and create weights; existing files are reused."""
    data = Path(arguments.data)
    chosen = choose_images(data, max(arguments.images, arguments.large_images))
    images, manifest = list_images(chosen[: arguments.images], folder, "photographs")
    only = arguments.only.split(",") if arguments.only else list(CONTENDERS)
    unknown = set(only) - set(CONTENDERS)
    if unknown:
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: unknown; choose from {', '.join(CONTENDERS)}")
    selected = {JOB, *only, *(CONTENDERS[name].engine_of for name in only)} - _missing()

    def suite(model: str, title: str, images: Path, manifest: Path, names: Iterable[str]) -> Suite:
        weights, labels, bundle = prepare_model(model, folder / "photographs.txt", folder)
        files = Files(model, weights, labels, bundle, images, manifest)
        full = len(images.read_text(encoding="utf-8").splitlines())
        counts = {
            "job": full,
            "ceiling": full,
            "documented": min(full, arguments.peer_images),
            "tuned": min(full, arguments.tuned_images or full),
        }
        small = max(1, min(arguments.small_images, min(counts.values()) // 2))
        return Suite(title, files, folder, tuple(name for name in names if name in selected), counts, small)

    suites = [
        suite(model, f"{model}, photographs of 500 px", images, manifest, CONTENDERS_AT_500_PIXELS)
        for model in filter(None, arguments.models.split(","))
    ]
    if arguments.large_images:
        larger = folder / f"large-{arguments.large_images}"
        if not larger.exists():
            note(f"enlarging {arguments.large_images} photographs to {_LARGE_SIDE_PIXELS} px")
            partial = folder / "large-partial"
            shutil.rmtree(partial, ignore_errors=True)
            enlarge_images(chosen[: arguments.large_images], partial, _LARGE_SIDE_PIXELS)
            partial.rename(larger)
        images, manifest = list_images(sorted(larger.iterdir()), folder, "large-photographs")
        title = f"{arguments.large_model}, photographs of {_LARGE_SIDE_PIXELS:,} px"
        suites.append(suite(arguments.large_model, title, images, manifest, CONTENDERS_AT_1500_PIXELS))
    return suites


def _missing() -> set[str]:
    """Programs whose package is not installed."""
    if importlib.util.find_spec("daft") is not None:
        return set()
    note("daft is not installed and is skipped: pip install 'batchcls[bench]'")
    return {"daft", "daft-tuned"}
