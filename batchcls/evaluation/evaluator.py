"""Evaluates the logits of a model or the predictions of a run: metrics, calibration and thresholds."""

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
    negative_log_likelihood,
    split_halves,
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
from batchcls.inference.taxonomy import taxonomy_levels
from batchcls.models.model_bundle import Calibration, HeldOut
from batchcls.preprocessing import AugmentationName

_MIN_ROWS = 2


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Hierarchical metrics and predictions in the category tree.

    Attributes:
        flat: Scores of the top-1 label of every row, without abstention.
        deepest: Held-out scores of the accepted label or, if there is none, of the deepest node above its
            threshold; None if node probabilities are unknown.
        coverage: Fraction of the held-out rows (0..1) for which a node is predicted.
        depth_thresholds: Threshold of each depth, fitted on all rows; empty without node probabilities.
        names: Paths of all nodes, in the form a/b/c.
        node: Index in `names` of the node predicted for each of N rows at the thresholds of all rows; -1 if
            none is.
    """

    flat: PathScores
    deepest: PathScores | None = None
    coverage: float | None = None
    depth_thresholds: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    node: Categories | None = None


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Complete result of an evaluation.

    Attributes:
        before: Outcomes at temperature 1, or as recorded by a run.
        outcomes: Outcomes at the applied temperature; equal to `before` if none is applied.
        ranked_categories: Number of categories with a rank; None if all are ranked.
        metrics: Metrics by name, see `classification_metrics.summary`.
        ece_before: Expected calibration error of `before`.
        temperature: FittedHead temperature; None for a run, which stores no logits.
        thresholds: Thresholds fitted on all rows.
        held_out: Temperature and thresholds evaluated on held-out rows.
        confusion: Confusion matrix of `outcomes`.
        hierarchy: Hierarchical metrics; None if the categories have no paths.
        paths: Paths of the categories; None if they have none.
    """

    before: Outcomes
    outcomes: Outcomes
    ranked_categories: int | None
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
        """Whether each row reaches its threshold, as in `classify --abstain`."""
        return self.thresholds.accepts(self.outcomes.predicted, self.outcomes.probability)

    def calibration(self, manifest_fingerprint: str, tta: AugmentationName) -> Calibration:
        """The calibration record of a bundle. Only valid if the result was computed from logits.

        Args:
            manifest_fingerprint: Fingerprint of the labeled manifest.
            tta: Test-time augmentation whose views were averaged.
        """
        assert self.temperature is not None
        both = self.held_out.combined
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


def evaluate_logits(
    store: LogitStore, paths: Sequence[Path] | None, target_precision: float
) -> EvaluationResult:
    """Compute metrics, temperature, thresholds and hierarchical metrics from logits.

    Args:
        store: Logits of at least two labeled rows.
        paths: Paths of the K categories in the category tree; None if there is no tree.
        target_precision: Above 0 and below 1.

    Raises:
        InputError: There are fewer than two rows.
    """
    _require_rows(len(store))
    halves = split_halves(store.truth)
    fitted = [fit_temperature(store, half) for half in halves]
    temperature = Temperature(
        fitted=fit_temperature(store),
        nll_before=negative_log_likelihood(store, 1.0),
        nll_held_out=_held_out_nll(store, fitted, halves),
    )
    before = store.outcomes(1.0)
    after = (
        (store.outcomes(fitted[0]), store.outcomes(fitted[1])) if temperature.applied else (before, before)
    )
    held_out = check_held_out(store.truth, after, target_precision)
    outcomes = store.outcomes(temperature.value) if temperature.applied else before
    result = replace(_evaluate(before, outcomes, held_out, target_precision, paths), temperature=temperature)
    if paths is None:
        return result
    nodes = node_outcomes(store, temperature.value, taxonomy_levels(paths))
    return replace(result, hierarchy=_evaluate_hierarchy(result, nodes, paths))


def evaluate_outcomes(
    outcomes: Outcomes, ranked_categories: int, paths: Sequence[Path] | None, target_precision: float
) -> EvaluationResult:
    """Compute what does not need logits: no temperature and no node probabilities.

    Args:
        outcomes: Outcomes of at least two rows.
        ranked_categories: Number of categories with a rank.
        paths: Paths of the K categories in the category tree; None if there is no tree.
        target_precision: Above 0 and below 1.

    Raises:
        InputError: There are fewer than two rows.
    """
    _require_rows(len(outcomes))
    held_out = check_held_out(outcomes.truth, (outcomes, outcomes), target_precision)
    return _evaluate(outcomes, outcomes, held_out, target_precision, paths, ranked_categories)


def _evaluate(
    before: Outcomes,
    outcomes: Outcomes,
    held_out: HeldOutCheck,
    target_precision: float,
    paths: Sequence[Path] | None,
    ranked_categories: int | None = None,
) -> EvaluationResult:
    confusion = Confusion.of(outcomes)
    hierarchy = None
    if paths is not None:
        pairs = zip(
            confusion.truth.tolist(), confusion.predicted.tolist(), confusion.rows.tolist(), strict=True
        )
        hierarchy = Hierarchy(path_scores(paths, paths, pairs))
    return EvaluationResult(
        before=before,
        outcomes=outcomes,
        ranked_categories=ranked_categories,
        metrics=summary(outcomes, ranked_categories),
        ece_before=calibration_error(before.probability, before.correct),
        temperature=None,
        thresholds=fit_thresholds(
            outcomes.predicted, outcomes.probability, outcomes.correct, len(outcomes.labels), target_precision
        ),
        held_out=held_out,
        confusion=confusion,
        hierarchy=hierarchy,
        paths=None if paths is None else tuple(paths),
    )


def _evaluate_hierarchy(
    result: EvaluationResult, levels: Sequence[NodeOutcomes], paths: Sequence[Path]
) -> Hierarchy:
    """Add abstention to the hierarchical metrics; `levels` has the node outcomes of each depth."""
    assert result.hierarchy is not None
    target_precision, truth = result.thresholds.target_precision, result.outcomes.truth
    all_rows = np.arange(len(truth))
    limits = tuple(level.threshold(all_rows, target_precision) for level in levels)
    names, node = deepest_paths(levels, limits)
    first, second = split_halves(truth)
    held_out_node = np.full(len(truth), -1, np.int32)
    for fit_rows, test_rows in ((first, second), (second, first)):
        _, fitted = deepest_paths(levels, [level.threshold(fit_rows, target_precision) for level in levels])
        held_out_node[test_rows] = fitted[test_rows]
    predicted_paths = [*(tuple(name.split("/")) for name in names), ()]
    leaves = _leaf_nodes(levels)
    held = result.held_out
    held_out_node = np.where(held.accepted, leaves[held.outcomes.predicted], held_out_node)
    return replace(
        result.hierarchy,
        deepest=path_scores(paths, predicted_paths, count_pairs(truth, held_out_node)),
        coverage=float((held_out_node >= 0).mean()),
        depth_thresholds=limits,
        names=names,
        node=np.where(result.accepted, leaves[result.outcomes.predicted], node),
    )


def _held_out_nll(store: LogitStore, fitted: Sequence[float], halves: tuple[Rows, Rows]) -> float:
    """Mean negative log-likelihood of all rows, each half at the temperature fitted on the other half."""
    parts = zip(reversed(fitted), halves, strict=True)
    total = sum(negative_log_likelihood(store, value, half) * len(half) for value, half in parts)
    return total / len(store)


def _leaf_nodes(levels: Sequence[NodeOutcomes]) -> Categories:
    """Index of the full path of each category among the node names of all levels."""
    inner_nodes = sum(len(outcomes.level.names) for outcomes in levels[:-1])
    return levels[-1].level.of_class + np.int32(inner_nodes)


def _require_rows(rows: int) -> None:
    if rows < _MIN_ROWS:
        raise InputError(
            f"only {rows} row(s) can be evaluated; thresholds are fitted on one half of the rows and evaluated on "
            "the other, which takes hundreds of rows: use a larger labeled manifest"
        )


def _finite(threshold: float) -> float | None:
    return threshold if np.isfinite(threshold) else None
