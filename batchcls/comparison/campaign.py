"""All candidates one after the other: what is there already is left, what fails is noted, the rest is measured."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from batchcls.comparison.candidate import Candidate
from batchcls.comparison.measure import Measured
from batchcls.comparison.recommend import BUSY_CORES
from batchcls.comparison.results import Finished, Results
from batchcls.comparison.terminal import result_line
from batchcls.errors import BatchclsError, InputError
from batchcls.models.engines import REFERENCE
from batchcls.storage import redact_uri

_logger = logging.getLogger(__name__)

Reference = tuple[int, ...] | None
MeasureOne = Callable[[Candidate, Reference], Measured]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A candidate that could not be measured, and why."""

    candidate: Candidate
    error: BatchclsError

    @property
    def reason(self) -> str:
        """Why, in a line."""
        return str(self.error).removeprefix(f"{self.candidate}: ")


def run_campaign(
    candidates: Sequence[Candidate],
    results: Results,
    measure_one: MeasureOne,
    begin: Callable[[Candidate], None],
) -> list[Skipped]:
    """Measure every candidate that `results` does not have yet, and keep each as soon as it is finished.

    Args:
        candidates: those in fp32 before the others of the same bundle, which are compared with them.
        results: what was measured before; is added to.
        measure_one: measures a candidate; is given the best classes of its fp32 reference if known.
        begin: is told of every candidate when its turn comes.

    Returns:
        The candidates that could not be measured; they are tried again by the next run.

    Raises:
        BatchclsError: none of the candidates could be measured, nor was before; the message has the reasons.
    """
    before = sum(results.find(candidate) is not None for candidate in candidates)
    if before:
        _logger.info("resumed: %d of %d measured before", before, len(candidates))
    skipped = []
    for number, candidate in enumerate(candidates, start=1):
        begin(candidate)
        finished = results.find(candidate)
        if finished is None:
            try:
                if candidate.pointless is not None:
                    raise InputError(candidate.pointless)
                measured = measure_one(candidate, _reference(candidate, results))
            except BatchclsError as error:
                skipped.append(Skipped(candidate, error))
                _logger.warning("skipped %s: %s", candidate, skipped[-1].reason)
                continue
            finished = results.add(candidate, measured)
            _tell(candidate, finished, f"{number} of {len(candidates)}")
        _warn_if_busy(candidate, finished, results)
    if len(skipped) == len(candidates):
        raise _nothing_measured(skipped)
    return skipped


def _reference(candidate: Candidate, results: Results) -> Reference:
    finished = results.find(replace(candidate, choice=REFERENCE))
    return None if finished is None else finished.answers


def _tell(candidate: Candidate, finished: Finished, place: str) -> None:
    _logger.info("%s (%s)", result_line(finished.measurement), place)
    for note in finished.notes:
        _logger.info("%s: %s", candidate, note)


def _warn_if_busy(candidate: Candidate, finished: Finished, results: Results) -> None:
    load = finished.measurement.other_load
    if load > BUSY_CORES:
        _logger.warning(
            "%s: other programs kept %.1f cores busy while it was measured, so it is faster than these figures; "
            "end them, remove %s and run the command again",
            candidate,
            load,
            redact_uri(results.uri_of(candidate)),
        )


def _nothing_measured(skipped: Sequence[Skipped]) -> BatchclsError:
    reasons = "; ".join(f"{entry.candidate}: {entry.reason}" for entry in skipped)
    kind = InputError if all(isinstance(entry.error, InputError) for entry in skipped) else BatchclsError
    return kind(f"no candidate could be measured: {reasons}")
