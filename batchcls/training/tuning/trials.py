"""The trials of a search: their table in the work directory, the comparison with the recipe, and the choice.

The trial with the lowest loss on the held-out rows is compared with the recipe row by row: both have the same rows, so
that the standard error of the mean difference is much smaller than those of the two losses. The recipe is kept unless
the difference is larger than this error.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from batchcls.storage.documents import Count, StoredRecord
from batchcls.storage.filesystem import Storage, explain
from batchcls.storage.store_errors import resumable_errors
from batchcls.training.tuning.search_space import RECIPE_TRIAL, TrialValues

TUNING_FILE = "tuning.parquet"
"""File of the work directory with the table of trials."""

TrialStatus = Literal["finished", "stopped", "diverged", "failed"]

_KEY = b"batchcls.search"

TRIALS_SCHEMA = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("head_learning_rate", pa.float64(), nullable=False),
        pa.field("epochs", pa.int32(), nullable=False),
        pa.field("crop_scale_min", pa.float64(), nullable=False),
        pa.field("mixup", pa.float64(), nullable=False),
        pa.field("color_jitter", pa.float64(), nullable=False),
        pa.field("label_smoothing", pa.float64(), nullable=False),
        pa.field("held_out_loss", pa.float64()),
        pa.field("held_out_top1", pa.float64()),
        pa.field("gain", pa.float64()),
        pa.field("gain_error", pa.float64()),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("epoch_losses", pa.list_(pa.float64()), nullable=False),
        pa.field("row_losses", pa.list_(pa.float32())),
    ]
)
"""Columns of tuning.parquet, one row per trial that has ended; `docs/how-to/fine-tune.md` describes them."""

_logger = logging.getLogger(__name__)


class Trial(StoredRecord):
    """A trial that has ended.

    Attributes:
        trial: number of the trial, from 1; the first one has the values of the recipe.
        status: finished: all epochs; stopped: ended early, because its loss was worse than that of other trials;
            diverged: the gradient of a step was not finite; failed: its worker failed too often.
        values: values of the searched settings.
        held_out_loss: mean cross-entropy of the held-out rows after the last epoch; None if no epoch ended.
        held_out_top1: top-1 accuracy on the held-out rows, 0..1.
        seconds: duration of all epochs.
        epoch_losses: mean cross-entropy of the held-out rows after each epoch.
        row_losses: cross-entropy of each held-out row after the last epoch; None unless the trial is finished.
    """

    trial: Count
    status: TrialStatus
    values: TrialValues
    held_out_loss: float | None = None
    held_out_top1: float | None = None
    seconds: float = 0.0
    epoch_losses: tuple[float, ...] = ()
    row_losses: tuple[float, ...] | None = None


class TuningChoice(StoredRecord):
    """The result of a search, as it is stored in the lineage of the bundle.

    Attributes:
        trials: number of trials by status.
        held_out_rows: number of rows on which the trials are compared.
        best_trial: number of the finished trial with the lowest loss.
        chosen_trial: number of the trial whose values are used; 1: those of the recipe.
        chosen: values that are used.
        recipe: values of the recipe.
        loss: mean cross-entropy of the best trial on the held-out rows.
        top1: top-1 accuracy of the best trial on the held-out rows, 0..1.
        recipe_loss: mean cross-entropy with the values of the recipe.
        recipe_top1: top-1 accuracy with the values of the recipe, 0..1.
        gain: `recipe_loss` minus `loss`.
        gain_error: standard error of `gain`, from the differences of all rows.
    """

    trials: dict[str, Count]
    held_out_rows: Count
    best_trial: Count
    chosen_trial: Count
    chosen: TrialValues
    recipe: TrialValues
    loss: float
    top1: float
    recipe_loss: float
    recipe_top1: float
    gain: float
    gain_error: float

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.trials.items())
        kept = "the values of the recipe are kept"
        if self.best_trial == RECIPE_TRIAL:
            return f"{kept}: no trial is better than the recipe on {self.held_out_rows} held-out images ({counts})"
        comparison = (
            f"trial {self.best_trial} has a loss of {self.loss:.3f} on {self.held_out_rows} held-out images, the "
            f"recipe {self.recipe_loss:.3f} (difference {self.gain:.3f} \N{PLUS-MINUS SIGN} {self.gain_error:.3f}; "
            f"{self.top1:.1%} and {self.recipe_top1:.1%} correct; {counts})"
        )
        if self.chosen_trial == RECIPE_TRIAL:
            return f"{comparison}: {kept}, because the difference is within one standard error"
        return f"{comparison}: its values are used: {self.chosen.changes_from(self.recipe)}"


def choose(trials: Iterable[Trial]) -> TuningChoice:
    """Choose the values of the best finished trial, or those of the recipe; see the module.

    Args:
        trials: all trials that have ended; the trial of the recipe is finished.
    """
    trials = list(trials)
    finished = [trial for trial in trials if trial.status == "finished"]
    (recipe,) = (trial for trial in finished if trial.trial == RECIPE_TRIAL)
    best = min(finished, key=lambda trial: float(_losses(trial).mean()))
    gain, gain_error = difference(recipe, best)
    chosen = best if gain > gain_error else recipe
    statuses = [trial.status for trial in trials]
    assert best.held_out_top1 is not None
    assert recipe.held_out_top1 is not None
    return TuningChoice(
        trials={status: statuses.count(status) for status in sorted(set(statuses))},
        held_out_rows=len(_losses(recipe)),
        best_trial=best.trial,
        chosen_trial=chosen.trial,
        chosen=chosen.values,
        recipe=recipe.values,
        loss=float(_losses(best).mean()),
        top1=best.held_out_top1,
        recipe_loss=float(_losses(recipe).mean()),
        recipe_top1=recipe.held_out_top1,
        gain=gain,
        gain_error=gain_error,
    )


def difference(recipe: Trial, other: Trial) -> tuple[float, float]:
    """Return how much lower the mean loss of a finished trial is than that of the recipe, and its standard error."""
    differences = _losses(recipe) - _losses(other)
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return float(differences.mean()), float(error)


def read_trials(uri: str, key: str, storage: Storage) -> dict[int, Trial]:
    """Read the trials of an earlier command by number; empty if there are none, or they are of another search.

    Args:
        uri: URI of tuning.parquet.
        key: identifies what the losses depend on besides the values of a trial.
        storage: storage that holds the work directory.
    """
    with explain(uri):
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            return {}
    try:
        table = pq.read_table(pa.BufferReader(data))
        if (table.schema.metadata or {}).get(_KEY) != key.encode():
            return {}
        trials = [_trial_of(row) for row in table.select(TRIALS_SCHEMA.names).to_pylist()]
    except (pa.ArrowException, KeyError, ValidationError) as error:
        _logger.warning("%s is damaged (%s); all trials are repeated", uri, type(error).__name__)
        return {}
    return {trial.trial: trial for trial in trials}


def write_trials(uri: str, trials: Mapping[int, Trial], key: str, storage: Storage) -> None:
    """Write or replace the table of trials.

    Raises:
        StorageStoppedError: the table cannot be written.
    """
    recipe = trials.get(RECIPE_TRIAL)
    rows = [_row_of(trials[number], recipe) for number in sorted(trials)]
    table = pa.Table.from_pylist(rows, TRIALS_SCHEMA.with_metadata({_KEY: key.encode()}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    with resumable_errors(uri):
        storage.write_atomic(uri, sink.getvalue().to_pybytes())


def ranked(trials: Iterable[Trial]) -> Sequence[Trial]:
    """Return the trials in the order of their losses; those that are not finished follow."""
    return sorted(
        trials,
        key=lambda trial: (
            trial.status != "finished",
            math.inf if trial.held_out_loss is None else trial.held_out_loss,
        ),
    )


def _losses(trial: Trial) -> npt.NDArray[np.float64]:
    assert trial.row_losses is not None, "only finished trials have losses of rows"
    return np.array(trial.row_losses, np.float64)


def _row_of(trial: Trial, recipe: Trial | None) -> dict[str, object]:
    row = trial.model_dump(exclude={"values"}) | trial.values.model_dump()
    if recipe is not None and recipe.status == trial.status == "finished":
        row["gain"], row["gain_error"] = difference(recipe, trial)
    return row


def _trial_of(row: Mapping[str, Any]) -> Trial:
    values = {name: row[name] for name in TrialValues.model_fields}
    rest = {name: row[name] for name in Trial.model_fields if name != "values"}
    lists: dict[str, Any] = {
        name: None if rest[name] is None else tuple(rest[name]) for name in ("epoch_losses", "row_losses")
    }
    return Trial.model_validate({**rest, **lists, "values": values})
