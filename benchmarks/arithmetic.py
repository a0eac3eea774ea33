"""Computes rates, ratios within a round and agreement of predictions from the rounds of a benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

MIN_AGREEMENT = 0.97
"""Minimum share of the photographs for which a program in fp32 predicts the same top-1 label as the job.

The programs round differently when they preprocess a photograph, so the labels of photographs near a class
boundary may differ. A program that computes something else agrees on far fewer.
"""


class DisagreementError(Exception):
    """The predictions of a program differ from those of the job, so their speeds are not comparable."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of one program.

    Attributes:
        images: number of photographs that it predicted.
        seconds: duration of its pipeline, including the startup of workers and network, at least 0.
        images_per_second_after_start: throughput after startup; None if the program does not report it.
        measured_images: number of photographs of the measurement; less than `images` if `seconds` is projected.
    """

    images: int
    seconds: float
    images_per_second_after_start: float | None = None
    measured_images: int | None = None

    @property
    def images_per_second(self) -> float:
        """Images per second, including startup."""
        return self.images / self.seconds


def project(small: Timing, large: Timing, images: int) -> Timing:
    """Project the time for `images` photographs from two runs of different sizes.

    A slow program processes fewer photographs, and its startup would weigh more than in a full run. The
    difference of the two runs gives the time per photograph; the rest is startup and is counted once. If the
    two runs contradict each other because of other load, the rate of the larger run is used.

    Args:
        small: run with fewer photographs than `large`.
        large: other run of the same program.
        images: number of photographs, at least that of `large`.
    """
    average = large.seconds / large.images
    marginal = (large.seconds - small.seconds) / (large.images - small.images)
    seconds_per_image = marginal if 0 < marginal < average else average
    seconds = large.seconds + seconds_per_image * (images - large.images)
    return Timing(images, seconds, large.images_per_second_after_start, large.images)


def median_of_ratios(ours: Sequence[Timing], theirs: Sequence[Timing]) -> float:
    """Median of the speedups of the job over another program within each round.

    The runs of a round are consecutive, so variations of the speed of the machine affect both.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    return median(
        our.images_per_second / their.images_per_second for our, their in zip(ours, theirs, strict=True)
    )


def efficiency(ours: Sequence[Timing], ceiling: Sequence[Timing]) -> float | None:
    """Median throughput of the job after startup relative to the ceiling; None if one of them does not report it."""
    shares = [
        our.images_per_second_after_start / bare.images_per_second_after_start
        for our, bare in zip(ours, ceiling, strict=True)
        if our.images_per_second_after_start and bare.images_per_second_after_start
    ]
    return median(shares) if shares else None


def agreement(ours: Mapping[str, str], theirs: Mapping[str, str]) -> float:
    """Share of the photographs of another program with the same top-1 label as in the job, 0..1.

    Args:
        ours: label of the job by path.
        theirs: label of the other program by path.

    Raises:
        DisagreementError: the other program predicted no photograph, or one that the job did not predict.
    """
    unknown = theirs.keys() - ours.keys()
    if not theirs or unknown:
        raise DisagreementError(
            f"{len(theirs)} photographs were predicted, {len(unknown)} of them not by the job"
        )
    return sum(ours[path] == label for path, label in theirs.items()) / len(theirs)


def require_agreement(name: str, share: float) -> None:
    """Require that a program in fp32 agrees with the job.

    Args:
        name: program, for the error message.
        share: agreement with the job, 0..1.

    Raises:
        DisagreementError: the share is below MIN_AGREEMENT or NaN.
    """
    if not share >= MIN_AGREEMENT:  # also true for NaN
        raise DisagreementError(
            f"{name} agrees with the job on {share:.1%} of the photographs; {MIN_AGREEMENT:.0%} are required"
        )


def summarize(rounds: Mapping[str, Sequence[Timing]], job: str) -> dict[str, Any]:
    """Summarize the programs of a suite for the record: medians, rounds, and the speedup of the job.

    Args:
        rounds: timings of the rounds, in order, by program.
        job: name of the program that the others are compared with.
    """
    summary: dict[str, Any] = {}
    for name, timings in rounds.items():
        summary[name] = {
            "images_per_second": round(median(timing.images_per_second for timing in timings), 2),
            "rounds": [asdict(timing) for timing in timings],
        }
        after = [
            timing.images_per_second_after_start for timing in timings if timing.images_per_second_after_start
        ]
        if after:
            summary[name]["images_per_second_after_start"] = round(median(after), 2)
        if job in rounds and name != job:
            summary[name]["job_is_times_as_fast"] = round(median_of_ratios(rounds[job], timings), 2)
    return summary
