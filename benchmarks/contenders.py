"""Defines the programs of the benchmark: name, description and command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

Kind = Literal["job", "ceiling", "documented", "tuned"]


@dataclass(frozen=True, slots=True)
class Contender:
    """One program.

    Attributes:
        name: name in commands and in the record.
        title: human-readable name.
        kind: the job; its engine without a pipeline; another program as documented; the same program
            with all optimizations that its documentation describes.
        module: Python module to run.
        arguments: arguments in addition to those of its kind.
        exact: whether it computes in fp32, so that its predictions must agree with those of the job.
        engine_of: name of the job whose engine the ceiling uses.
    """

    name: str
    title: str
    kind: Kind
    module: str
    arguments: tuple[str, ...] = ()
    exact: bool = False
    engine_of: str = "job"


JOB = "job"
CEILING = "bare"
_JOB_MODULE = "batchcls.jobs.classify"
_PEERS = "benchmarks.peers"
_BATCH_SIZE = 16  # for a job without a measured batch size

CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(JOB, "batchcls", "job", _JOB_MODULE),
        Contender("job-int8", "batchcls, int8 allowed", "job", _JOB_MODULE),
        Contender(CEILING, "same engine, bare loop", "ceiling", f"{_PEERS}.bare_loop"),
        Contender(
            "bare-int8",
            "same int8 engine, bare loop",
            "ceiling",
            f"{_PEERS}.bare_loop",
            engine_of="job-int8",
        ),
        Contender("bare-pillow", "same engine, Pillow", "ceiling", f"{_PEERS}.bare_loop", ("--pillow",)),
        Contender("ray", "Ray's example", "documented", f"{_PEERS}.ray_example", exact=True),
        Contender("daft", "Daft's example", "documented", f"{_PEERS}.daft_example", exact=True),
        Contender("dataloader", "DataLoader (timm)", "documented", f"{_PEERS}.dataloader", exact=True),
        Contender("ray-tuned", "Ray, tuned", "tuned", f"{_PEERS}.ray_example", ("--tuned",)),
        Contender("daft-tuned", "Daft, tuned", "tuned", f"{_PEERS}.daft_example", ("--tuned",)),
        Contender("dataloader-tuned", "DataLoader, tuned", "tuned", f"{_PEERS}.dataloader", ("--tuned",)),
    )
}

CONTENDERS_AT_500_PIXELS = tuple(name for name in CONTENDERS if name != "bare-pillow")
CONTENDERS_AT_1500_PIXELS = (JOB, CEILING, "bare-pillow", "dataloader", "dataloader-tuned")


@dataclass(frozen=True, slots=True)
class Files:
    """Input files of the programs of a suite.

    Attributes:
        model: timm architecture.
        weights: safetensors file.
        labels: text file with one class name per line.
        bundle: bundle with the same model, weights and labels.
        images: text file with one photograph path per line.
        manifest: manifest with the same photographs.
    """

    model: str
    weights: Path
    labels: Path
    bundle: Path
    images: Path
    manifest: Path


@dataclass(frozen=True, slots=True)
class JobEngine:
    """The engine that the job selected."""

    engine: str
    precision: str
    batch_size: int

    @classmethod
    def of(cls, measurements: Mapping[str, Any]) -> "JobEngine":
        """Read the engine from `measurements` of a run.json.

        Raises:
            ValueError: no engine is recorded.
        """
        match = re.search(r"\b(torch|compile|openvino) (fp32|bf16|fp16|int8)\b", str(measurements["engines"]))
        if match is None:
            raise ValueError(f"run.json names no engine: {measurements['engines']}")
        sizes = [choice["batch_size"] for choice in measurements.get("engine_selections", ())]
        return cls(match.group(1), match.group(2), sizes[0] if sizes else _BATCH_SIZE)


def command(
    contender: Contender,
    files: Files,
    output: Path,
    *,
    int8_min_agreement: float,
    engine: JobEngine | None,
) -> list[str]:
    """Arguments for the Python interpreter that run a program.

    Args:
        contender: program.
        files: input files.
        output: output folder, which must not exist yet.
        int8_min_agreement: minimum agreement with fp32 for a job that may use int8.
        engine: engine that the job selected; required for a ceiling.
    """
    start = ["-m", contender.module, *contender.arguments, "--output", str(output)]
    if contender.kind == "job":
        start += ["--manifest", str(files.manifest), "--model", str(files.bundle), "--ray-address", "local"]
        if contender.name == "job-int8":
            start += ["--int8-min-agreement", str(int8_min_agreement)]
        return start
    start += ["--images", str(files.images)]
    if contender.kind == "ceiling":
        assert engine is not None, "a job runs before its ceiling"
        return [
            *(*start, "--bundle", str(files.bundle)),
            *("--engine", engine.engine, "--precision", engine.precision),
            *("--batch-size", str(engine.batch_size)),
        ]
    return [
        *(*start, "--model", files.model),
        *("--weights", str(files.weights), "--labels", str(files.labels)),
    ]


def best_labels(contender: Contender, output: Path) -> dict[str, str]:
    """Top-1 label of each photograph by path, read from the output of a program."""
    if contender.kind == "job":
        (folder,) = output.glob("runs/*/predictions")
        table = pq.read_table(folder, columns=["uri", "label"])
        return dict(zip(table["uri"].to_pylist(), table["label"].to_pylist(), strict=True))
    table = pq.read_table(output, columns=["path", "labels"])
    return {
        path: labels[0]
        for path, labels in zip(table["path"].to_pylist(), table["labels"].to_pylist(), strict=True)
    }
