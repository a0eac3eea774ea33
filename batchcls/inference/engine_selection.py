"""The engine of a node, chosen by measurement: the fastest that keeps what was asked for of fp32's answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from batchcls.errors import BatchclsError, InputError
from batchcls.hardware import Hardware
from batchcls.inference.agreement import EngineAgreement, is_close_to
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

_CHEAPER_REFERENCE = EngineChoice("openvino", "fp32")
_EXACTNESS = ("fp32", "fp16", "bf16", "int8")
_BATCH_SIZES = (4, 8, 16, 32)
_FIRST_BATCH = 8
_FIRST_IMAGES = 16
_LEAST_IMAGES = 100  # below, a share of 99 % says little
_LEVEL = 0.97  # what comes this close to the fastest is as fast
_HOPELESS = 0.8  # of the rate of one that holds the contract: not worth any more time
_RATES_SECONDS = 6.0  # for all batch sizes of a candidate: longer tells no more
_TOLERANCE = 0.01  # between two engines in fp32, of the largest number in their answers


@dataclass(frozen=True, slots=True)
class CalibrationImages:
    """Images that engines are measured with.

    Attributes:
        pixels: N,H,W,3 uint8, N at least 1, in the bundle's preprocessing.
        manifest: fingerprint of the manifest that they are from.
    """

    pixels: npt.NDArray[np.uint8]
    manifest: str

    @property
    def calibration(self) -> npt.NDArray[np.uint8]:
        """The half that int8 takes its scales from; what it answers to the other half is measured."""
        return self.pixels[::2]


def choose(
    bundle: Bundle, sample: CalibrationImages, wanted: EngineRequest, place: EngineConfig, seconds: float
) -> EngineSelectionRecord:
    """Measure the candidates here, in a process that should have the machine to itself, and choose.

    A candidate that cannot run, fails its golden test or misses the contract is not taken, and the
    record says why. One whose precision was asked for by name is taken though it misses what is asked
    of bf16 and fp16, with a note; int8 is refused below a bound that is set.

    Args:
        bundle: the model, with golden answers.
        sample: images of the catalog.
        wanted: what was asked for.
        place: where the engines run. Its batch size is that of a GPU, a CPU's is found out; without
            `calibration` int8 gets that of the sample.
        seconds: for all measurements together; starting engines and conversions are not counted.

    Raises:
        InputError: what was asked for by name cannot be had here, or misses its bound.
        GoldenMismatch: the network does not answer as its bundle says.
    """
    started = time.perf_counter()
    asked = candidates(wanted, place.device, has_bf16=Hardware.detect().has_bf16)
    if place.calibration is None:
        place = replace(place, calibration=lambda: sample.calibration)
    measuring = _Measuring(bundle, sample, wanted, place, seconds)
    measuring.find_reference(asked.choices)
    for number, choice in enumerate(asked.choices):
        measuring.measure(choice, len(asked.choices) - number)
    taken, figures = pick(measuring.figures)
    if taken is None:
        reasons = "; ".join(f"{entry.choice}: {entry.rejected}" for entry in figures)
        raise InputError(
            f"--engine {wanted.engine} --precision {wanted.precision}: nothing of that can be used here ({reasons})"
        )
    hardware = Hardware.detect()
    assert taken.batch_size is not None
    assert taken.images_per_second is not None
    return EngineSelectionRecord(
        created=datetime.now(UTC),
        wanted=wanted,
        bundle_fingerprint=bundle.fingerprint,
        hardware_key=hardware.key,
        hardware=str(hardware),
        versions=installed_versions(),
        device=place.device,
        threads=place.threads,
        manifest=sample.manifest,
        images=len(sample.pixels),
        seconds=round(time.perf_counter() - started, 1),
        reference=measuring.reference_name,
        engine=taken.engine,
        precision=taken.precision,
        batch_size=taken.batch_size,
        images_per_second=taken.images_per_second,
        candidates=figures,
        notes=(*asked.notes, *measuring.notes),
    )


class _Measuring:
    """The candidates of one choice, one after the other; holds what they are compared with and the time left."""

    def __init__(
        self,
        bundle: Bundle,
        sample: CalibrationImages,
        wanted: EngineRequest,
        place: EngineConfig,
        seconds: float,
    ) -> None:
        self.notes: list[str] = []
        self.figures: list[CandidateResult] = []
        self.reference_name = str(REFERENCE)
        self._bundle, self._wanted, self._place = bundle, wanted, place
        self._seconds = self._left = seconds
        # In another order than the manifest's, so that the first few stand for all of them.
        self._order = np.random.default_rng(0).permutation(len(sample.pixels))
        self._pixels = sample.pixels[self._order]
        self._started: dict[EngineChoice, tuple[Engine, float]] = {}
        self._reference: EngineOutput | None = None

    def find_reference(self, choices: Sequence[EngineChoice]) -> None:
        """EngineOutput the sample in fp32, as much of it as fits into a third of the time."""
        engine, _ = self._start(REFERENCE)
        first = self._pixels[:_FIRST_IMAGES]
        answer, rate = self._timed(engine, first)
        too_slow = len(self._pixels) / rate > self._seconds / 6
        if too_slow and any(choice.engine == _CHEAPER_REFERENCE.engine for choice in choices):
            engine, rate = self._cheaper(answer, rate) or (engine, rate)
        # Of these int8 answers only the half that it was not made with.
        least = _LEAST_IMAGES * (2 if any(choice.precision == "int8" for choice in choices) else 1)
        images = max(least, int(rate * self._seconds / 3))
        self._pixels = self._pixels[:images]
        started = time.perf_counter()
        self._reference = predict_all(engine, self._pixels, _FIRST_BATCH)
        self._left -= time.perf_counter() - started
        # PyTorch has one number of threads for all engines of a process, which the next one may change.
        del self._started[REFERENCE]
        if len(self._pixels) < _LEAST_IMAGES:
            self.notes.append(
                f"only {len(self._pixels)} images were at hand; agreement is a share of {_LEAST_IMAGES} or more "
                "where it shall mean something"
            )

    def _cheaper(self, answer: EngineOutput, rate: float) -> tuple[Engine, float] | None:
        """A faster engine in fp32 and its rate, if it says the same about the first images."""
        try:
            engine, _ = self._start(_CHEAPER_REFERENCE)
        except BatchclsError as error:
            self.notes.append(f"{_CHEAPER_REFERENCE} cannot stand in for {REFERENCE}: {error}")
            return None
        found, faster = self._timed(engine, self._pixels[:_FIRST_IMAGES])
        if not is_close_to(found, answer, _TOLERANCE):
            self.notes.append(f"{_CHEAPER_REFERENCE} does not answer as {REFERENCE} does on the first images")
            return None
        if faster <= rate:
            return None
        self.reference_name = str(_CHEAPER_REFERENCE)
        return engine, faster

    def _timed(self, engine: Engine, pixels: npt.NDArray[np.uint8]) -> tuple[EngineOutput, float]:
        """Answers and, after a first round for warm-up, images per second."""
        begun = time.perf_counter()
        predict_all(engine, pixels, _FIRST_BATCH)
        started = time.perf_counter()
        answer = predict_all(engine, pixels, _FIRST_BATCH)
        ended = time.perf_counter()
        self._left -= ended - begun
        return answer, len(pixels) / (ended - started)

    def measure(self, choice: EngineChoice, remaining: int) -> None:
        """Measure one candidate in its share of the time, and keep its figures.

        Args:
            choice: the candidate.
            remaining: how many are to be measured yet, this one included.
        """
        if self._left <= 0 and any(entry.rejected is None for entry in self.figures):
            self._keep(choice, rejected="not measured, since the time was over (--calibration-seconds)")
            return
        named = (choice.engine, choice.precision) == (self._wanted.engine, self._wanted.precision)
        try:
            engine, start_seconds = self._start(choice)
        except BatchclsError as error:
            if named:
                raise
            self._keep(choice, rejected=str(error))
            return
        started = time.perf_counter()
        try:
            found = self._try(choice, engine, max(1.0, self._left / remaining))
        except (MemoryError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if named:
                raise InputError(f"{choice} cannot run this network here: {reason}") from error
            found = {"rejected": f"it cannot run this network here: {reason}"}
        finally:
            self._left -= time.perf_counter() - started
            self._started.pop(choice, None)
        if named and found.get("rejected"):
            raise InputError(f"--engine {choice.engine} --precision {choice.precision}: {found['rejected']}")
        self._keep(choice, start_seconds=round(start_seconds, 2), **found)

    def _keep(self, choice: EngineChoice, **found: object) -> None:
        self.figures.append(
            CandidateResult.model_validate({"engine": choice.engine, "precision": choice.precision, **found})
        )

    def _start(self, choice: EngineChoice) -> tuple[Engine, float]:
        if choice not in self._started:
            started = time.perf_counter()
            place = replace(self._place, batch_size=max(self._batch_sizes()))
            engine, _ = start_tested_engine(self._bundle, choice, place)
            self._started[choice] = engine, time.perf_counter() - started
        return self._started[choice]

    def _batch_sizes(self) -> tuple[int, ...]:
        if self._wanted.batch_size is not None:
            return (self._wanted.batch_size,)
        return (self._place.batch_size,) if self._place.device == "cuda" else _BATCH_SIZES

    def _try(self, choice: EngineChoice, engine: Engine, seconds: float) -> dict[str, object]:
        """What is found out about a running candidate: a slow or wrong one ends before the batch sizes."""
        sizes = self._batch_sizes()
        first = _FIRST_BATCH if _FIRST_BATCH in sizes else sizes[0]
        rate = measure_throughput(engine, self._pixels, first, min(1.0, seconds / 8)).images_per_second
        found: dict[str, object] = {"rates": {first: rate}, "batch_size": first, "images_per_second": rate}
        best = max((entry for entry in self.figures if not entry.rejected), key=_rate, default=None)
        if best is not None and rate < _HOPELESS * _rate(best):
            return found | {"rejected": f"slower than {best.choice}"}
        agreement = self._agreement(choice, engine, first, int(rate * seconds / 3))
        found |= {
            "images": agreement.images,
            "top1_agreement": agreement.top1_agreement,
            "mean_cosine": agreement.mean_cosine,
            "least_cosine": agreement.least_cosine,
        }
        missed = agreement.missed(self._wanted.contract, choice.precision)
        if missed is not None:
            if self._wanted.precision != choice.precision or choice.precision == "int8":
                return found | {"rejected": missed}
            self.notes.append(f"{choice} was asked for by name and is used although {missed}")
        else:
            close = agreement.close_call(self._wanted.contract, choice.precision)
            self.notes += [] if close is None else [f"{choice}: {close}"]
        rates = throughput_by_batch_size(engine, self._pixels, sizes, rate, min(seconds / 2, _RATES_SECONDS))
        size = best_batch_size(rates, _LEVEL)
        return found | {"rates": rates, "batch_size": size, "images_per_second": rates[size]}

    def _agreement(
        self, choice: EngineChoice, engine: Engine, batch_size: int, images: int
    ) -> EngineAgreement:
        """EngineAgreement on at least 100 of the images, where there are; int8 answers those it was not made with."""
        assert self._reference is not None
        places = np.arange(len(self._pixels))
        if choice.precision == "int8":
            held_out = np.flatnonzero(self._order[: len(places)] % 2)
            places = held_out if len(held_out) else places
        places = places[: max(_LEAST_IMAGES, images)]
        answer = predict_all(engine, self._pixels[places], batch_size)
        reference = EngineOutput(self._reference.logits[places], self._reference.embedding[places])
        return EngineAgreement.between(answer, reference)


def _rate(figures: CandidateResult) -> float:
    return figures.images_per_second or 0.0


def pick(found: Sequence[CandidateResult]) -> tuple[CandidateResult | None, tuple[CandidateResult, ...]]:
    """The candidate to take, the most exact of those as fast as the fastest; and all with their reasons."""
    holding = [entry for entry in found if entry.rejected is None]
    if not holding:
        return None, tuple(found)
    most = max(map(_rate, holding))
    level = [entry for entry in holding if _rate(entry) >= _LEVEL * most]
    taken = min(level, key=lambda entry: (_EXACTNESS.index(entry.precision), -_rate(entry)))

    def judged(entry: CandidateResult) -> CandidateResult:
        if entry is taken or entry.rejected is not None:
            return entry
        reason = "hardly faster than" if _rate(entry) > _rate(taken) else "slower than"
        return entry.model_copy(update={"rejected": f"{reason} {taken.choice}"})

    return taken, tuple(map(judged, found))
