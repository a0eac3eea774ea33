"""Computes the complete evaluation from the predictions of a model or of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.evaluation.calibration import (
    HeldOutCheck,
    Temperature,
    Thresholds,
    check_held_out,
    fit_temperature,
    fit_thresholds,
    halves_of,
    negative_log_likelihood,
)
from batchcls.evaluation.classification_metrics import (
    CalibrationError,
    Categories,
    Confusion,
    Outcomes,
    Rows,
    calibration_error,
    summary,
)
from batchcls.evaluation.hierarchy import (
    NodeOutcomes,
    Path,
    PathScores,
    count_pairs,
    deepest_paths,
    node_outcomes,
    path_scores,
)
from batchcls.evaluation.model_predictions import LogitStore
from batchcls.inference.taxonomy import levels_of
from batchcls.models.model_bundle import Calibration, HeldOut
from batchcls.preprocessing import AugmentationName

_LEAST_ROWS = 2


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """LogitStore in the tree of categories.

    Attributes:
        flat: the best label of every row, abstaining never.
        deepest: an accepted label, or else the deepest node that is probable enough, at thresholds that were
            fitted on the other half of the rows; None where there are no masses of nodes.
        named: share of the rows (0..1) for which a node is named at all.
        depth_thresholds: fitted on all rows, for each depth; empty without masses.
        names: paths of all nodes, written a/b/c.
        place: what each of N rows gets at thresholds of all rows, in `names`; -1: nothing.
    """

    flat: PathScores
    deepest: PathScores | None = None
    named: float | None = None
    depth_thresholds: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    place: Categories | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What was found.

    Attributes:
        before: outcomes at temperature 1, or as a run has them.
        outcomes: at the temperature; those of `before` where there is none.
        kept: how many categories were ranked; None: all.
        metrics: see `metrics.summary`.
        ece_before: expected calibration error of `before`.
        temperature: None for a run, whose logits are gone.
        thresholds: fitted on all rows.
        held_out: what temperature and thresholds are worth on other rows.
        hierarchy: None where categories have no paths.
        paths: of the categories; None where they have none.
    """

    before: Outcomes
    outcomes: Outcomes
    kept: int | None
    metrics: Mapping[str, float | None]
    ece_before: CalibrationError
    temperature: Temperature | None
    thresholds: Thresholds
    held_out: HeldOutCheck
    confusion: Confusion
    hierarchy: Hierarchy | None
    paths: tuple[Path, ...] | None

    @property
    def accepted(self) -> npt.NDArray[np.bool_]:
        """Whether each row is sure enough at the thresholds of all rows, as `classify --abstain` has it."""
        return self.thresholds.accepts(self.outcomes.predicted, self.outcomes.probability)

    def calibration(self, manifest_fingerprint: str, tta: AugmentationName) -> Calibration:
        """What a bundle keeps of it: only of answers whose logits are known.

        Args:
            manifest_fingerprint: of the labeled rows.
            tta: the views that were averaged.
        """
        assert self.temperature is not None
        both = self.held_out.together
        depths = self.hierarchy.depth_thresholds if self.hierarchy is not None else ()
        return Calibration(
            temperature=self.temperature.value,
            ece_before=self.ece_before.value,
            ece_after=self.held_out.ece.value,
            target_precision=self.thresholds.target_precision,
            thresholds=tuple(map(_finite, self.thresholds.by_category.tolist())),
            depth_thresholds=tuple(map(_finite, depths)) or None,
            held_out=HeldOut(rows=both.rows, precision=both.precision, coverage=both.coverage),
            rows=len(self.outcomes),
            manifest_fingerprint=manifest_fingerprint,
            tta=tta,
        )


def evaluate_answers(answers: LogitStore, paths: Sequence[Path] | None, target_precision: float) -> Evaluated:
    """Everything there is to find in logits.

    Args:
        answers: at least two rows.
        paths: of the K categories in a tree; None: there is no tree.
        target_precision: above 0 and below 1.

    Raises:
        InputError: there are fewer than two rows.
    """
    _require_rows(len(answers))
    halves = halves_of(answers.truth)
    fitted = [fit_temperature(answers, half) for half in halves]
    temperature = Temperature(
        fitted=fit_temperature(answers),
        nll_before=negative_log_likelihood(answers, 1.0),
        nll_held_out=_crossed_nll(answers, fitted, halves),
    )
    before = answers.outcomes(1.0)
    after = (
        (answers.outcomes(fitted[0]), answers.outcomes(fitted[1]))
        if temperature.applied
        else (before, before)
    )
    held_out = check_held_out(answers.truth, after, target_precision)
    outcomes = answers.outcomes(temperature.value) if temperature.applied else before
    found = replace(_evaluated(before, outcomes, held_out, target_precision, paths), temperature=temperature)
    if paths is None:
        return found
    nodes = node_outcomes(answers, temperature.value, levels_of(paths))
    return replace(found, hierarchy=_hierarchy(found, nodes, paths))


def evaluate_outcomes(
    outcomes: Outcomes, kept: int, paths: Sequence[Path] | None, target_precision: float
) -> Evaluated:
    """What can be found without logits: no temperature, no masses of nodes, ranks among the kept categories only.

    Raises:
        InputError: there are fewer than two rows.
    """
    _require_rows(len(outcomes))
    held_out = check_held_out(outcomes.truth, (outcomes, outcomes), target_precision)
    return _evaluated(outcomes, outcomes, held_out, target_precision, paths, kept)


def _evaluated(
    before: Outcomes,
    outcomes: Outcomes,
    held_out: HeldOutCheck,
    target_precision: float,
    paths: Sequence[Path] | None,
    kept: int | None = None,
) -> Evaluated:
    confusion = Confusion.of(outcomes)
    hierarchy = None
    if paths is not None:
        pairs = zip(
            confusion.truth.tolist(), confusion.predicted.tolist(), confusion.rows.tolist(), strict=True
        )
        hierarchy = Hierarchy(path_scores(paths, paths, pairs))
    return Evaluated(
        before=before,
        outcomes=outcomes,
        kept=kept,
        metrics=summary(outcomes, kept),
        ece_before=calibration_error(before.probability, before.right),
        temperature=None,
        thresholds=fit_thresholds(
            outcomes.predicted, outcomes.probability, outcomes.right, len(outcomes.labels), target_precision
        ),
        held_out=held_out,
        confusion=confusion,
        hierarchy=hierarchy,
        paths=None if paths is None else tuple(paths),
    )


def _hierarchy(found: Evaluated, nodes: Sequence[NodeOutcomes], paths: Sequence[Path]) -> Hierarchy:
    assert found.hierarchy is not None
    wished, truth = found.thresholds.target_precision, found.outcomes.truth
    every = np.arange(len(truth))
    limits = tuple(one.threshold(every, wished) for one in nodes)
    names, place = deepest_paths(nodes, limits)
    first, second = halves_of(truth)
    checked = np.full(len(truth), -1, np.int32)
    for here, there in ((first, second), (second, first)):
        _, elsewhere = deepest_paths(nodes, [one.threshold(here, wished) for one in nodes])
        checked[there] = elsewhere[there]
    answers = [*(tuple(name.split("/")) for name in names), ()]
    leaves = _leaves(nodes)
    held = found.held_out
    checked = np.where(held.accepted, leaves[held.outcomes.predicted], checked)
    place = np.where(found.accepted, leaves[found.outcomes.predicted], place)
    scores = path_scores(paths, answers, count_pairs(truth, checked))
    named = float((checked >= 0).mean())
    return replace(
        found.hierarchy,
        deepest=scores,
        named=named,
        depth_thresholds=limits,
        names=names,
        place=place,
    )


def _crossed_nll(answers: LogitStore, fitted: Sequence[float], halves: tuple[Rows, Rows]) -> float:
    """Mean over all rows, those of each half at the temperature of the other."""
    parts = zip(reversed(fitted), halves, strict=True)
    total = sum(negative_log_likelihood(answers, value, half) * len(half) for value, half in parts)
    return total / len(answers)


def _leaves(nodes: Sequence[NodeOutcomes]) -> Categories:
    """For each category the place of its whole path among the names of all levels."""
    above = sum(len(one.level.names) for one in nodes[:-1])
    return nodes[-1].level.of_class + np.int32(above)


def _require_rows(rows: int) -> None:
    if rows < _LEAST_ROWS:
        raise InputError(
            f"{rows} row can be judged; thresholds are fitted on one half and checked on the other, which takes "
            "hundreds: give a larger labeled manifest"
        )


def _finite(threshold: float) -> float | None:
    return threshold if np.isfinite(threshold) else None
