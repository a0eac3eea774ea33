"""Runs the job and other programs alternately on the same photographs and weights: `make bench`.

    python -m benchmarks.run --models resnet50,mobilenetv3_large_100 --images 2000 --peer-images 400 --rounds 3

Every program runs in a separate process and reports the duration of its pipeline, including the startup of
workers and network, but excluding `ray.init` and the imports of the driver. The programs of a round run
consecutively, and the result is the median of the ratios within the rounds, because the speed of a machine
varies. benchmarks/README.md describes what is compared and why the comparison is fair.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batchcls.hardware import Hardware
from benchmarks.arithmetic import (
    DisagreementError,
    Timing,
    agreement,
    efficiency,
    project,
    require_agreement,
    summarize,
)
from benchmarks.contenders import (
    CEILING,
    CONTENDERS,
    JOB,
    Contender,
    JobEngine,
    best_labels,
    command,
)
from benchmarks.plot import Panel, draw
from benchmarks.preparation import Suite, limit_images, plan_suites
from benchmarks.process import REPOSITORY, note, python

_PACKAGES = ("ray", "torch", "torchvision", "timm", "openvino", "daft", "numpy", "pillow", "simplejpeg")


@dataclass(slots=True)
class SuiteResults:
    """Results of a suite so far."""

    timings: dict[str, list[Timing]] = field(default_factory=lambda: defaultdict(list))
    agreements: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    engines: dict[str, JobEngine] = field(default_factory=dict)
    job_records: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))


def run_once(
    suite: Suite, contender: Contender, count: int, results: SuiteResults, int8_min_agreement: float
) -> tuple[Timing, dict[str, str]]:
    """Run one process; returns its time and the top-1 label of each photograph."""
    output = _empty_output(suite, contender)
    arguments = command(
        contender,
        limit_images(suite.files, count),
        output,
        int8_min_agreement=int8_min_agreement,
        engine=results.engines.get(contender.engine_of),
    )
    stdout = python(arguments, suite.folder)
    labels = best_labels(contender, output)
    if contender.kind != "job":
        report = json.loads(stdout.splitlines()[-1])
        return Timing(count, report["seconds"], report.get("images_per_second_after_start")), labels
    (path,) = output.glob("runs/*/run.json")
    measurements = json.loads(path.read_text(encoding="utf-8"))["measurements"]
    results.engines[contender.name] = JobEngine.of(measurements)
    results.job_records[contender.name].append(measurements)
    after = (measurements.get("bottleneck") or {}).get("images_per_second_after_start")
    return Timing(count, count / measurements["images_per_second"], after), labels


def _empty_output(suite: Suite, contender: Contender) -> Path:
    """An output folder without predictions; that of a job keeps the selected engine, as in nightly runs."""
    if contender.kind != "job":
        output = suite.folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        return output
    output = suite.folder / f"{contender.name}-{suite.files.model}-{suite.files.images.stem}"
    shutil.rmtree(output / "runs", ignore_errors=True)
    (output / "current.json").unlink(missing_ok=True)
    return output


def run_round(
    suite: Suite, order: Iterable[str], ours: dict[str, str], results: SuiteResults, bound: float
) -> None:
    """Run every program once, slow ones twice, and compare their predictions with those of the job.

    Raises:
        DisagreementError: the predictions of a program in fp32 differ.
    """
    for name in order:
        contender = CONTENDERS[name]
        count = suite.counts[contender.kind]
        full = suite.counts["job"]
        timing, labels = run_once(suite, contender, count, results, bound)
        share = agreement(ours, labels)
        results.agreements[name].append(share)
        if contender.exact:
            require_agreement(contender.title, share)
        if count < full:
            small, _ = run_once(suite, contender, suite.small, results, bound)
            timing = project(small, timing, full)
        results.timings[name].append(timing)
        note(
            f"{suite.title}: {contender.title} {timing.images_per_second:.1f} images/s over {full}"
            f"{f' (from {count} and {suite.small})' if count < full else ''}, {share:.1%} agreement"
        )


def run_suite(suite: Suite, rounds: int, bound: float) -> dict[str, Any]:
    """Run all rounds of a suite, after a first run of each job that measures and converts its engines."""
    results = SuiteResults()
    ours: dict[str, str] = {}
    first_seconds: dict[str, float] = {}
    for name in (name for name in suite.names if CONTENDERS[name].kind == "job"):
        started = time.perf_counter()
        _, labels = run_once(suite, CONTENDERS[name], suite.counts["job"], results, bound)
        first_seconds[name] = round(time.perf_counter() - started, 1)
        ours = ours or labels
        note(f"{suite.title}: first {name} took {first_seconds[name]} s, with {results.engines[name]}")
    results.job_records.clear()
    for number in range(rounds):
        # Reversing the order keeps a machine that slows down during a round from favoring the first programs.
        run_round(suite, suite.names if number % 2 == 0 else suite.names[::-1], ours, results, bound)
    programs = summarize({name: results.timings[name] for name in suite.names}, JOB)
    for name, shares in results.agreements.items():
        programs[name]["agreement_with_job"] = [round(share, 4) for share in shares]
    record: dict[str, Any] = {
        "title": suite.title,
        "images": suite.counts["job"],
        "engines": {name: asdict(engine) for name, engine in results.engines.items()},
        "seconds_of_the_first_run": first_seconds,
        "programs": programs,
        "job_measured": dict(results.job_records),
    }
    if CEILING in suite.names:
        record["efficiency"] = efficiency(results.timings[JOB], results.timings[CEILING])
    return record


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default="resnet50,mobilenetv3_large_100", help="timm architectures, separated by commas")
    add("--images", type=int, default=2000, help="photographs for the job and the bare loop")
    add(
        "--peer-images",
        type=int,
        default=400,
        help="photographs for documented programs; projected to --images",
    )
    add(
        "--tuned-images", type=int, default=0, help="photographs for tuned programs; 0: the value of --images"
    )
    add(
        "--small-images",
        type=int,
        default=64,
        help="photographs of the run that separates startup from processing",
    )
    add("--large-images", type=int, default=1000, help="photographs of 1,500 px; 0 skips this suite")
    add("--large-model", default="mobilenetv3_large_100", help="model for the photographs of 1,500 px")
    add("--rounds", type=int, default=3)
    add("--only", help=f"other programs to run, separated by commas: {', '.join(CONTENDERS)}")
    add("--int8-min-agreement", type=float, default=0.9, help="minimum agreement of the job with int8")
    add(
        "--data",
        default=str(REPOSITORY.parent / "shared" / "data"),
        help="folder with imagenet/ and catalog/",
    )
    add("--folder", help="folder that keeps weights, images and conversions; default: a temporary folder")
    add("--results", default=str(REPOSITORY / "benchmarks" / "results"), help="folder for DATE-peers.json")
    add(
        "--image",
        default=str(REPOSITORY / "docs" / "images" / "benchmarks.png"),
        help="PNG or SVG file of the plot; empty: no plot",
    )
    return parser.parse_args(arguments)


def _versions() -> dict[str, str | None]:
    """Versions of the compared packages; None if not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def main(arguments: list[str] | None = None) -> None:
    """Run all suites and write the record and the plot."""
    settings = _parse(arguments)
    if not Path(settings.data).is_dir():
        raise SystemExit(f"--data {settings.data}: no such folder")
    with tempfile.TemporaryDirectory(prefix="batchcls-bench-") as temporary:
        folder = Path(settings.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            suites = plan_suites(settings, folder)
            records = [run_suite(suite, settings.rounds, settings.int8_min_agreement) for suite in suites]
        except DisagreementError as error:
            raise SystemExit(f"no results: {error}") from error
    hardware = Hardware.detect()
    date = datetime.now(UTC).date().isoformat()
    record = {
        "date": date,
        "hardware": hardware.model_dump(mode="json") | {"python": platform.python_version()},
        "versions": _versions(),
        "settings": {
            name: value
            for name, value in vars(settings).items()
            if name not in ("data", "folder", "results", "image")
        },
        "suites": records,
    }
    target = Path(settings.results) / f"{date}-peers.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(target)
    if settings.image:
        caption = (
            f"medians of {settings.rounds} rounds, {date}, {hardware.cores} cores of {hardware.processor}"
        )
        draw([Panel(suite["title"], suite["programs"]) for suite in records], caption, Path(settings.image))
        print(settings.image)


if __name__ == "__main__":
    main()
