"""Selection of the engine of a node by measurement: the fastest engine within the accuracy tolerance of fp32."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from batchcls.errors import BatchclsError, InputError
from batchcls.hardware import Hardware
from batchcls.inference.agreement import EngineAgreement, outputs_close
from batchcls.inference.engine_record import (
    CandidateResult,
    EngineRequest,
    EngineSelectionRecord,
    candidates,
    installed_versions,
)
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.throughput import (
    best_batch_size,
    measure_throughput,
    predict_all,
    throughput_by_batch_size,
)
from batchcls.models.engines.engine import REFERENCE, Engine, EngineChoice, EngineConfig, EngineOutput
from batchcls.models.model_bundle import Bundle

_FASTER_REFERENCE = EngineChoice("openvino", "fp32")
_PRECISIONS_BY_ACCURACY = ("fp32", "fp16", "bf16", "int8")
_BATCH_SIZES = (4, 8, 16, 32)
_FIRST_BATCH_SIZE = 8
_FIRST_IMAGES = 16
_MIN_IMAGES = 100  # with fewer images, a top-1 agreement of 99% is not significant
_EQUAL_RATE_SHARE = 0.97  # rates with at least this share of the highest rate count as equal
_HOPELESS_RATE_SHARE = (
    0.8  # a candidate below this share of an accepted candidate's rate is not measured further
)
_MAX_RATES_SECONDS = 6.0  # for all batch sizes of a candidate; longer measurements are not more precise
_FP32_DIFFERENCE = 0.01  # allowed between two fp32 engines, relative to the largest value of an output


@dataclass(frozen=True, slots=True)
class CalibrationImages:
    """Images with which engines are measured.

    Attributes:
        pixels: N,H,W,3 uint8, N at least 1, in the preprocessing of the bundle.
        manifest: fingerprint of the manifest from which they were sampled.
    """

    pixels: npt.NDArray[np.uint8]
    manifest: str

    @property
    def calibration(self) -> npt.NDArray[np.uint8]:
        """The half from which int8 quantization computes its scales; its accuracy is measured on the other half."""
        return self.pixels[::2]


def select_engine(
    bundle: Bundle,
    sample: CalibrationImages,
    request: EngineRequest,
    config: EngineConfig,
    seconds: float,
) -> EngineSelectionRecord:
    """Measure the candidates on this machine and select one; no other work should run here meanwhile.

    A candidate that cannot run, fails its golden test or violates the tolerance is rejected, with the reason in the
    record. A candidate whose precision was requested explicitly is selected with a note even if it violates the
    limits of bf16 and fp16; int8 is rejected below its limit in any case.

    Args:
        bundle: the model, with golden outputs.
        sample: images of the catalog.
        request: the requested engine, precision and tolerance.
        config: device and resources of the engines. Its batch size is used on a GPU; on a CPU the best one is
            measured. Without `calibration`, int8 is calibrated with half of the sample.
        seconds: for all measurements together; starting and compiling engines is not counted.

    Raises:
        InputError: an explicitly requested engine or precision is not available, or violates its limit.
        GoldenMismatch: the network does not reproduce the golden outputs of the bundle.
    """
    started = time.perf_counter()
    plan = candidates(request, config.device, has_bf16=Hardware.detect().has_bf16)
    if config.calibration is None:
        config = replace(config, calibration=lambda: sample.calibration)
    measurement = _Measurement(bundle, sample, request, config, seconds)
    measurement.compute_reference(plan.choices)
    for number, choice in enumerate(plan.choices):
        measurement.measure(choice, len(plan.choices) - number)
    selected, results = select_candidate(measurement.results)
    if selected is None:
        reasons = "; ".join(f"{result.choice}: {result.rejected}" for result in results)
        raise InputError(
            f"--engine {request.engine} --precision {request.precision}: no candidate can be used here ({reasons})"
        )
    hardware = Hardware.detect()
    assert selected.batch_size is not None
    assert selected.images_per_second is not None
    return EngineSelectionRecord(
        created=datetime.now(UTC),
        request=request,
        bundle_fingerprint=bundle.fingerprint,
        hardware_key=hardware.key,
        hardware=str(hardware),
        versions=installed_versions(),
        device=config.device,
        threads=config.threads,
        manifest=sample.manifest,
        images=len(sample.pixels),
        seconds=round(time.perf_counter() - started, 1),
        reference=measurement.reference_name,
        engine=selected.engine,
        precision=selected.precision,
        batch_size=selected.batch_size,
        images_per_second=selected.images_per_second,
        candidates=results,
        notes=(*plan.notes, *measurement.notes),
    )


class _Measurement:
    """Measures candidates sequentially; holds the outputs of the reference and the remaining time."""

    def __init__(
        self,
        bundle: Bundle,
        sample: CalibrationImages,
        request: EngineRequest,
        config: EngineConfig,
        seconds: float,
    ) -> None:
        self.notes: list[str] = []
        self.results: list[CandidateResult] = []
        self.reference_name = str(REFERENCE)
        self._bundle, self._request, self._config = bundle, request, config
        self._seconds = self._remaining_seconds = seconds
        # Shuffled, so that a prefix of the images is representative of all of them.
        self._order = np.random.default_rng(0).permutation(len(sample.pixels))
        self._pixels = sample.pixels[self._order]
        self._started: dict[EngineChoice, tuple[Engine, float]] = {}
        self._reference: EngineOutput | None = None

    def compute_reference(self, choices: Sequence[EngineChoice]) -> None:
        """Compute the fp32 outputs of as many images as fit into a third of the time; the others are dropped."""
        engine, _ = self._start(REFERENCE)
        first = self._pixels[:_FIRST_IMAGES]
        output, rate = self._time_prediction(engine, first)
        is_slow = len(self._pixels) / rate > self._seconds / 6
        if is_slow and any(choice.engine == _FASTER_REFERENCE.engine for choice in choices):
            engine, rate = self._start_faster_reference(output, rate) or (engine, rate)
        # int8 is measured only on the half that did not calibrate it.
        min_images = _MIN_IMAGES * (2 if any(choice.precision == "int8" for choice in choices) else 1)
        images = max(min_images, int(rate * self._seconds / 3))
        self._pixels = self._pixels[:images]
        started = time.perf_counter()
        self._reference = predict_all(engine, self._pixels, _FIRST_BATCH_SIZE)
        self._remaining_seconds -= time.perf_counter() - started
        # PyTorch has one thread count for all engines of a process, which the next engine may change.
        del self._started[REFERENCE]
        if len(self._pixels) < _MIN_IMAGES:
            self.notes.append(
                f"only {len(self._pixels)} images were available; top-1 agreement is reliable with at least "
                f"{_MIN_IMAGES}"
            )

    def _start_faster_reference(self, expected: EngineOutput, rate: float) -> tuple[Engine, float] | None:
        """Start the faster fp32 engine; return it and its rate if it is faster and its outputs are the same."""
        try:
            engine, _ = self._start(_FASTER_REFERENCE)
        except BatchclsError as error:
            self.notes.append(f"{_FASTER_REFERENCE} cannot replace {REFERENCE} as reference: {error}")
            return None
        output, faster_rate = self._time_prediction(engine, self._pixels[:_FIRST_IMAGES])
        if not outputs_close(output, expected, _FP32_DIFFERENCE):
            self.notes.append(
                f"{_FASTER_REFERENCE} cannot replace {REFERENCE} as reference: its outputs for the first images differ"
            )
            return None
        if faster_rate <= rate:
            return None
        self.reference_name = str(_FASTER_REFERENCE)
        return engine, faster_rate

    def _time_prediction(self, engine: Engine, pixels: npt.NDArray[np.uint8]) -> tuple[EngineOutput, float]:
        """Return the output and the images per second, measured after a warm-up with the same images."""
        warmup_started = time.perf_counter()
        predict_all(engine, pixels, _FIRST_BATCH_SIZE)
        started = time.perf_counter()
        output = predict_all(engine, pixels, _FIRST_BATCH_SIZE)
        finished = time.perf_counter()
        self._remaining_seconds -= finished - warmup_started
        return output, len(pixels) / (finished - started)

    def measure(self, choice: EngineChoice, remaining_candidates: int) -> None:
        """Measure a candidate within its share of the remaining time, and store its result.

        Args:
            choice: the candidate.
            remaining_candidates: number of candidates that are not measured yet, including this one.
        """
        if self._remaining_seconds <= 0 and any(result.rejected is None for result in self.results):
            self._add_result(
                choice, rejected="not measured, because the time limit was reached (--calibration-seconds)"
            )
            return
        is_explicit = (choice.engine, choice.precision) == (self._request.engine, self._request.precision)
        try:
            engine, start_seconds = self._start(choice)
        except BatchclsError as error:
            if is_explicit:
                raise
            self._add_result(choice, rejected=str(error))
            return
        started = time.perf_counter()
        try:
            values = self._measure_started(
                choice, engine, max(1.0, self._remaining_seconds / remaining_candidates)
            )
        except (MemoryError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if is_explicit:
                raise InputError(f"{choice} cannot run this network here: {reason}") from error
            values = {"rejected": f"cannot run this network here: {reason}"}
        finally:
            self._remaining_seconds -= time.perf_counter() - started
            self._started.pop(choice, None)
        if is_explicit and values.get("rejected"):
            raise InputError(f"--engine {choice.engine} --precision {choice.precision}: {values['rejected']}")
        self._add_result(choice, start_seconds=round(start_seconds, 2), **values)

    def _add_result(self, choice: EngineChoice, **values: object) -> None:
        self.results.append(
            CandidateResult.model_validate({"engine": choice.engine, "precision": choice.precision, **values})
        )

    def _start(self, choice: EngineChoice) -> tuple[Engine, float]:
        """Return a started engine and the seconds that its start took; an engine is started once."""
        if choice not in self._started:
            started = time.perf_counter()
            config = replace(self._config, batch_size=max(self._batch_sizes()))
            engine, _ = start_tested_engine(self._bundle, choice, config)
            self._started[choice] = engine, time.perf_counter() - started
        return self._started[choice]

    def _batch_sizes(self) -> tuple[int, ...]:
        if self._request.batch_size is not None:
            return (self._request.batch_size,)
        return (self._config.batch_size,) if self._config.device == "cuda" else _BATCH_SIZES

    def _measure_started(self, choice: EngineChoice, engine: Engine, seconds: float) -> dict[str, object]:
        """Return the measured values of a candidate; a slow or inaccurate one is rejected early."""
        sizes = self._batch_sizes()
        first = _FIRST_BATCH_SIZE if _FIRST_BATCH_SIZE in sizes else sizes[0]
        rate = measure_throughput(engine, self._pixels, first, min(1.0, seconds / 8)).images_per_second
        values: dict[str, object] = {"rates": {first: rate}, "batch_size": first, "images_per_second": rate}
        best = max((result for result in self.results if not result.rejected), key=_rate, default=None)
        if best is not None and rate < _HOPELESS_RATE_SHARE * _rate(best):
            return values | {"rejected": f"slower than {best.choice}"}
        agreement = self._agreement(choice, engine, first, int(rate * seconds / 3))
        values |= {
            "images": agreement.images,
            "top1_agreement": agreement.top1_agreement,
            "mean_cosine": agreement.mean_cosine,
            "min_cosine": agreement.min_cosine,
        }
        violation = agreement.violation(self._request.tolerance, choice.precision)
        if violation is not None:
            if self._request.precision != choice.precision or choice.precision == "int8":
                return values | {"rejected": violation}
            self.notes.append(f"{choice} was requested explicitly and is used although {violation}")
        else:
            warning = agreement.sampling_warning(self._request.tolerance, choice.precision)
            self.notes += [] if warning is None else [f"{choice}: {warning}"]
        rates = throughput_by_batch_size(
            engine, self._pixels, sizes, rate, min(seconds / 2, _MAX_RATES_SECONDS)
        )
        size = best_batch_size(rates, _EQUAL_RATE_SHARE)
        return values | {"rates": rates, "batch_size": size, "images_per_second": rates[size]}

    def _agreement(
        self, choice: EngineChoice, engine: Engine, batch_size: int, images: int
    ) -> EngineAgreement:
        """Measure the agreement on `images` images, but at least 100 if available; int8 on held-out images."""
        assert self._reference is not None
        indices = np.arange(len(self._pixels))
        if choice.precision == "int8":
            held_out = np.flatnonzero(self._order[: len(indices)] % 2)
            indices = held_out if len(held_out) else indices
        indices = indices[: max(_MIN_IMAGES, images)]
        output = predict_all(engine, self._pixels[indices], batch_size)
        reference = EngineOutput(self._reference.logits[indices], self._reference.embedding[indices])
        return EngineAgreement.between(output, reference)


def _rate(result: CandidateResult) -> float:
    return result.images_per_second or 0.0


def select_candidate(
    results: Sequence[CandidateResult],
) -> tuple[CandidateResult | None, tuple[CandidateResult, ...]]:
    """Select the most accurate of the fastest candidates.

    Returns:
        The selected candidate, None if all were rejected; and all candidates, with the reasons of their rejection.
    """
    accepted = [result for result in results if result.rejected is None]
    if not accepted:
        return None, tuple(results)
    highest = max(map(_rate, accepted))
    fastest = [result for result in accepted if _rate(result) >= _EQUAL_RATE_SHARE * highest]
    selected = min(
        fastest, key=lambda result: (_PRECISIONS_BY_ACCURACY.index(result.precision), -_rate(result))
    )

    def with_reason(result: CandidateResult) -> CandidateResult:
        if result is selected or result.rejected is not None:
            return result
        reason = "not significantly faster than" if _rate(result) > _rate(selected) else "slower than"
        return result.model_copy(update={"rejected": f"{reason} {selected.choice}"})

    return selected, tuple(map(with_reason, results))
