"""Benchmarks one candidate in this process, which should run alone on the machine.

In this order, so that no step is in the figures of another: load and first answer, latency,
throughput with the memory it takes, then what it answers, and last what it costs by counting.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from batchcls.comparison.agreement_with_reference import SamplePredictions, agreement, answer_all
from batchcls.comparison.candidates import Candidate
from batchcls.comparison.measurement import AccuracyResult, Latency, Measurement, Throughput
from batchcls.comparison.sample_pixels import Prepared
from batchcls.comparison.system_stats import OtherLoad, forget_peak_memory
from batchcls.comparison.timing import latency, throughputs
from batchcls.errors import BatchclsError, InputError
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.models.build import build_model
from batchcls.models.engines.batching import is_out_of_memory
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, Engine, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.flops import count_cost
from batchcls.models.model_bundle import Bundle
from batchcls.models.registry import published_weights, record_for_spec

_MAX_ANSWER_BATCH = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """A measurement, and what is needed beside it.

    Attributes:
        measurement: the figures.
        answers: best class of each image, which others are compared with if this is the reference.
        notes: what a person should know of how it was measured.
    """

    measurement: Measurement
    answers: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Timed:
    load_seconds: float
    latency: Latency
    throughput: list[Throughput]
    stopped: str | None
    other_load: float


def measure(
    bundle: Bundle, candidate: Candidate, prepared: Prepared, reference: Sequence[int] | None
) -> BenchmarkResult:
    """Measure one candidate here.

    Args:
        bundle: the model.
        candidate: what runs it, and how it is measured.
        prepared: the sample, in the bundle's preprocessing.
        reference: best classes of the same bundle in fp32 on this device; None: they are found out
            here, unless the candidate is the reference itself.

    Raises:
        InputError: the bundle does not hold together, or the engine cannot run this network.
        GoldenMismatch: the network does not answer as its bundle says.
        BatchclsError: it does not fit into memory.
    """
    bundle.verify(candidate.bundle_fingerprint)
    with _explained(candidate):
        engine, timed = _time(bundle, candidate, prepared)
        batch_size = _answer_batch(candidate, timed)
        answers = answer_all(engine, prepared.pixels, bundle.config.labels, batch_size)
        if reference is None:
            reference = _reference(bundle, candidate, prepared, answers, batch_size)
    # Labels say nothing about weights that were never trained.
    truth = prepared.labels if bundle.publishable else [None] * len(prepared.labels)
    agreed = agreement(answers, reference, truth, bundle.config.labels)
    notes = [] if timed.stopped is None else [timed.stopped]
    if candidate.choice.precision == "int8":
        notes.append("the sample is also what int8 took its scales from, so other images may agree less")
    return BenchmarkResult(
        _measurement(bundle, candidate, prepared, timed, agreed), answers.first, tuple(notes)
    )


def _time(bundle: Bundle, candidate: Candidate, prepared: Prepared) -> tuple[Engine, _Timed]:
    place, pixels = candidate.place, prepared.pixels
    forget_peak_memory(place.device)
    started = time.perf_counter()
    engine = _start(bundle, candidate, candidate.choice, prepared)
    engine.predict(pixels[:1])
    load_seconds = time.perf_counter() - started
    load = OtherLoad.begin()
    single = latency(engine, pixels, place.seconds)
    batches, stopped = throughputs(
        engine, pixels, place.batch_sizes, place.seconds, worthwhile_only=place.worthwhile_only
    )
    return engine, _Timed(load_seconds, single, batches, stopped, load.cores())


def _start(bundle: Bundle, candidate: Candidate, choice: EngineChoice, prepared: Prepared) -> Engine:
    place = candidate.place
    where = EngineConfig(
        device=place.device,
        threads=place.threads,
        batch_size=max(place.batch_sizes),
        compile_cache=CompileCache.from_cache_dir(place.cache_dir),
        calibration=lambda: prepared.pixels,
    )
    if bundle.config.golden is None:
        return start_engine(bundle, choice, where)
    # Tested before it is converted, since what is converted is kept for the main job.
    engine, _ = start_tested_engine(bundle, choice, where)
    return engine


def _answer_batch(candidate: Candidate, timed: _Timed) -> int:
    """The largest batch size that has run and that the main job would use, too."""
    most = _MAX_ANSWER_BATCH[candidate.place.device]
    sizes = [entry.batch_size for entry in timed.throughput]
    return max((size for size in sizes if size <= most), default=1)


def _reference(
    bundle: Bundle, candidate: Candidate, prepared: Prepared, own: SamplePredictions, batch_size: int
) -> Sequence[int]:
    if candidate.choice == REFERENCE:
        return own.first
    engine = _start(bundle, candidate, REFERENCE, prepared)
    return answer_all(engine, prepared.pixels, bundle.config.labels, batch_size).first


@contextmanager
def _explained(candidate: Candidate) -> Iterator[None]:
    """What PyTorch raises when a network cannot run here, in a line for people."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise BatchclsError(
                f"{candidate}: it does not fit into memory, even one image at a time"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{candidate}: it cannot run this network ({reason}); leave it out") from error


def _measurement(
    bundle: Bundle, candidate: Candidate, prepared: Prepared, timed: _Timed, agreed: AccuracyResult
) -> Measurement:
    config, place = bundle.config, candidate.place
    size = (config.preprocessing.input_height, config.preprocessing.input_width)
    cost = count_cost(build_model(bundle).eval(), size)
    record = record_for_spec(config.spec)
    return Measurement(
        model=candidate.model,
        architecture=str(config.spec),
        family=None if record is None else record.family,
        bundle_fingerprint=candidate.bundle_fingerprint,
        weights=_weights(bundle),
        engine=str(candidate.choice),
        device=place.device,
        threads=place.threads,
        hardware=place.hardware,
        input_size=size,
        classes=len(config.labels),
        parameters=cost.parameters,
        multiply_adds=cost.multiply_adds,
        load_seconds=timed.load_seconds,
        latency=timed.latency,
        throughput=tuple(timed.throughput),
        prepare_ms=prepared.median_ms,
        agreement=agreed,
        published_top1=_published_top1(bundle),
        other_load=timed.other_load,
    )


def _weights(bundle: Bundle) -> str:
    origin = bundle.config.weights
    return origin.kind if origin.name == origin.kind else f"{origin.kind} {origin.name}"


def _published_top1(bundle: Bundle) -> float | None:
    """Top-1 in 0..1 of the published weights that these are, or that random ones stand for."""
    config = bundle.config
    if config.weights.kind not in ("pretrained", "random") or config.untrained_head:
        return None
    found = published_weights(config.spec)
    return None if found is None else found.top1 / 100
