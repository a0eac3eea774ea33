"""Computes rates, ratios within a round and agreement of predictions from the rounds of a benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

MIN_AGREEMENT = 0.97
"""Share of the photographs that a program in fp32 has to answer as this job does.

All round differently on the way from a photograph to the network's input, so a photograph on the edge
between two classes may fall on the other side; a program that does other work misses far more.
"""


class DisagreementError(Exception):
    """The predictions of a program differ from those of the job, so their speeds are not comparable."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one program.

    Attributes:
        images: number of photographs that it predicted.
        seconds: of its pipeline, the start of workers and network included, at least 0.
        images_per_second_after_start: where the program says it.
        measured_images: photographs that were actually predicted, fewer where `seconds` is projected.
    """

    images: int
    seconds: float
    images_per_second_after_start: float | None = None
    measured_images: int | None = None

    @property
    def images_per_second(self) -> float:
        """Images per second, including startup."""
        return self.images / self.seconds


def projected(small: Timing, large: Timing, images: int) -> Timing:
    """What `images` photographs would have taken, from runs of two sizes.

    A slow program gets fewer photographs, over which its start-up weighs more than over all of them. So
    what a photograph takes is the difference of the two runs; the rest is start-up and stays as it is.
    Where the two make no sense beside each other, since other programs were busy, the larger run's own
    rate holds for all.

    Args:
        small: of fewer photographs than `large`.
        large: the other run of the same program.
        images: at least as many as in `large`.
    """
    of_all = large.seconds / large.images
    of_more = (large.seconds - small.seconds) / (large.images - small.images)
    seconds_an_image = of_more if 0 < of_more < of_all else of_all
    seconds = large.seconds + seconds_an_image * (images - large.images)
    return Timing(images, seconds, large.images_per_second_after_start, large.images)


def median_of_ratios(ours: Sequence[Timing], theirs: Sequence[Timing]) -> float:
    """How many times as fast we are: the middle of the ratios within a round.

    Two runs of one round follow each other, so that both see the machine as fast as it was just then.
    """
    return median(
        our.images_per_second / their.images_per_second for our, their in zip(ours, theirs, strict=True)
    )


def efficiency(ours: Sequence[Timing], ceiling: Sequence[Timing]) -> float | None:
    """Median of our share of the ceiling's rate, start-up excluded; None where one does not say it."""
    shares = [
        our.images_per_second_after_start / bare.images_per_second_after_start
        for our, bare in zip(ours, ceiling, strict=True)
        if our.images_per_second_after_start and bare.images_per_second_after_start
    ]
    return median(shares) if shares else None


def agreement(ours: Mapping[str, str], theirs: Mapping[str, str]) -> float:
    """Share of their photographs, by path, to which our best label is theirs, 0..1.

    Raises:
        DisagreementError: they predicted none, or one that we did not.
    """
    unknown = theirs.keys() - ours.keys()
    if not theirs or unknown:
        raise DisagreementError(
            f"{len(theirs)} photographs were predicted, {len(unknown)} of them not by this job"
        )
    return sum(ours[path] == label for path, label in theirs.items()) / len(theirs)


def require_agreement(name: str, found: float) -> None:
    """Refuse to compare a program in fp32 that answers otherwise.

    Raises:
        DisagreementError: fewer answers than MIN_AGREEMENT are ours.
    """
    if not found >= MIN_AGREEMENT:  # so that a NaN is refused
        raise DisagreementError(
            f"{name} gives {found:.1%} of this job's answers, {MIN_AGREEMENT:.0%} are needed"
        )


def summarize(rounds: Mapping[str, Sequence[Timing]], job: str) -> dict[str, Any]:
    """All programs of a suite for the record, each with its rounds, and how many times as fast the job is.

    Args:
        rounds: timings of the rounds, in order, by program.
        job: the program that the others are compared with.
    """
    found: dict[str, Any] = {}
    for name, timings in rounds.items():
        found[name] = {
            "images_per_second": round(median(timing.images_per_second for timing in timings), 2),
            "rounds": [asdict(timing) for timing in timings],
        }
        after = [
            timing.images_per_second_after_start for timing in timings if timing.images_per_second_after_start
        ]
        if after:
            found[name]["images_per_second_after_start"] = round(median(after), 2)
        if job in rounds and name != job:
            found[name]["job_is_times_as_fast"] = round(median_of_ratios(rounds[job], timings), 2)
    return found
