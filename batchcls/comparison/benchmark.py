"""Benchmarks one candidate in this process, which should run alone on the machine.

The order of the steps keeps them from affecting each other: startup and first prediction, latency, throughput
with peak memory, predictions for the sample, and the count of parameters and MACs.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from batchcls.comparison.agreement_with_reference import SamplePredictions, agreement, predict_sample
from batchcls.comparison.candidates import Candidate
from batchcls.comparison.measurement import AccuracyResult, Latency, Measurement, Throughput
from batchcls.comparison.sample_pixels import SamplePixels
from batchcls.comparison.system_stats import OtherLoad, reset_peak_memory
from batchcls.comparison.timing import measure_latency, measure_throughputs
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

_MAX_PREDICT_BATCH = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """Result of benchmarking one candidate.

    Attributes:
        measurement: Measured values.
        predictions: Top-1 class of each image. If the candidate is the reference, other candidates are
            compared with them.
        notes: Human-readable remarks on the measurement.
    """

    measurement: Measurement
    predictions: tuple[int, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Timings:
    """Timings of a candidate; `stop_reason` states why larger batch sizes were not tried."""

    load_seconds: float
    latency: Latency
    throughput: list[Throughput]
    stop_reason: str | None
    other_load: float


def measure(
    bundle: Bundle, candidate: Candidate, sample: SamplePixels, reference: Sequence[int] | None
) -> BenchmarkResult:
    """Benchmark one candidate in this process.

    Args:
        bundle: The model.
        candidate: Engine and settings of the benchmark.
        sample: The sample with the preprocessing of the bundle.
        reference: Top-1 classes of the same bundle in fp32 on this device. None computes them here, unless the
            candidate is the reference itself.

    Raises:
        InputError: The bundle is inconsistent, or the engine cannot run this network.
        GoldenMismatch: The outputs of the network differ from the golden outputs of the bundle.
        BatchclsError: The network does not fit into memory.
    """
    bundle.verify(candidate.bundle_fingerprint)
    with _engine_errors(candidate):
        engine, timings = _time(bundle, candidate, sample)
        batch_size = _predict_batch_size(candidate, timings)
        predictions = predict_sample(engine, sample.pixels, bundle.config.labels, batch_size)
        if reference is None:
            reference = _reference(bundle, candidate, sample, predictions, batch_size)
    # The accuracy of untrained weights is meaningless.
    truth = sample.labels if bundle.publishable else [None] * len(sample.labels)
    accuracy = agreement(predictions, reference, truth, bundle.config.labels)
    notes = [] if timings.stop_reason is None else [timings.stop_reason]
    if candidate.choice.precision == "int8":
        notes.append("int8 was calibrated on this sample, so the agreement may be lower on other images")
    return BenchmarkResult(
        _measurement(bundle, candidate, sample, timings, accuracy), predictions.top1, tuple(notes)
    )


def _time(bundle: Bundle, candidate: Candidate, sample: SamplePixels) -> tuple[Engine, _Timings]:
    environment, pixels = candidate.environment, sample.pixels
    reset_peak_memory(environment.device)
    started = time.perf_counter()
    engine = _start(bundle, candidate, candidate.choice, sample)
    engine.predict(pixels[:1])
    load_seconds = time.perf_counter() - started
    load = OtherLoad.start()
    latency = measure_latency(engine, pixels, environment.seconds)
    throughput, stop_reason = measure_throughputs(
        engine,
        pixels,
        environment.batch_sizes,
        environment.seconds,
        stop_early=environment.stop_early,
    )
    return engine, _Timings(load_seconds, latency, throughput, stop_reason, load.cores())


def _start(bundle: Bundle, candidate: Candidate, choice: EngineChoice, sample: SamplePixels) -> Engine:
    environment = candidate.environment
    config = EngineConfig(
        device=environment.device,
        threads=environment.threads,
        batch_size=max(environment.batch_sizes),
        compile_cache=CompileCache.from_cache_dir(environment.cache_dir),
        calibration=lambda: sample.pixels,
    )
    if bundle.config.golden is None:
        return start_engine(bundle, choice, config)
    # The golden test runs before the conversion, because `classify` reuses the converted network.
    engine, _ = start_tested_engine(bundle, choice, config)
    return engine


def _predict_batch_size(candidate: Candidate, timings: _Timings) -> int:
    """The largest measured batch size that `classify` would also use."""
    limit = _MAX_PREDICT_BATCH[candidate.environment.device]
    sizes = [entry.batch_size for entry in timings.throughput]
    return max((size for size in sizes if size <= limit), default=1)


def _reference(
    bundle: Bundle,
    candidate: Candidate,
    sample: SamplePixels,
    predictions: SamplePredictions,
    batch_size: int,
) -> Sequence[int]:
    """Top-1 classes in fp32; `predictions` are those of the candidate."""
    if candidate.choice == REFERENCE:
        return predictions.top1
    engine = _start(bundle, candidate, REFERENCE, sample)
    return predict_sample(engine, sample.pixels, bundle.config.labels, batch_size).top1


@contextmanager
def _engine_errors(candidate: Candidate) -> Iterator[None]:
    """Convert errors of an engine that cannot run the network into one-line messages."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise BatchclsError(f"{candidate}: does not fit into memory, even with batch size 1") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{candidate}: cannot run this network ({reason}); remove it from the comparison"
        ) from error


def _measurement(
    bundle: Bundle, candidate: Candidate, sample: SamplePixels, timings: _Timings, accuracy: AccuracyResult
) -> Measurement:
    config, environment = bundle.config, candidate.environment
    size = (config.preprocessing.input_height, config.preprocessing.input_width)
    cost = count_cost(build_model(bundle).eval(), size)
    record = record_for_spec(config.spec)
    return Measurement(
        model=candidate.model,
        architecture=str(config.spec),
        family=None if record is None else record.family,
        bundle_fingerprint=candidate.bundle_fingerprint,
        weights=str(bundle.config.weights),
        engine=str(candidate.choice),
        device=environment.device,
        threads=environment.threads,
        hardware=environment.hardware,
        input_size=size,
        classes=len(config.labels),
        parameters=cost.parameters,
        multiply_adds=cost.multiply_adds,
        load_seconds=timings.load_seconds,
        latency=timings.latency,
        throughput=tuple(timings.throughput),
        prepare_ms=sample.median_ms,
        agreement=accuracy,
        published_top1=_published_top1(bundle),
        other_load=timings.other_load,
    )


def _published_top1(bundle: Bundle) -> float | None:
    """Published top-1 accuracy (0..1) of the weights, or of the default weights if the weights are random."""
    config = bundle.config
    if config.weights.kind not in ("pretrained", "random") or config.untrained_head:
        return None
    found = published_weights(config.spec)
    return None if found is None else found.top1 / 100
