"""The scheduler, stopper and callbacks with which Ray Tune runs the trials of a search."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from batchcls.errors import BatchclsError
from batchcls.training.tuning.search_space import RECIPE_TRIAL
from batchcls.training.tuning.trials import Trial

NUMBER = "trial"
"""Key of the number of a trial in its configuration."""

PROGRESS, LOSS = "progress", "held_out_loss"
"""Metrics that a trial reports to the scheduler: percent of its epochs, and the mean loss of the held-out rows."""

# The first decision about a trial is made after a third of its epochs, when the warm-up has ended, and the second after
# two thirds. At each, a trial continues if its loss is at most the median of the trials that were there before it.
_GRACE_PERCENT, _REDUCTION, _ALL_PERCENT = 30, 2, 100


class TrialListener(Protocol):
    """What is called for the events of the trials."""

    def on_result(self, number: int, result: Mapping[str, Any]) -> None:
        """Process the report of a trial after an epoch."""

    def on_end(self, number: int, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        """Process the end of a trial, with its last report or the error of its last failure."""


def trial_scheduler(ended: Iterable[Trial]) -> ASHAScheduler:
    """Return the scheduler of a search that knows the trials that have ended before."""
    scheduler = _KeepsRecipe(
        time_attr=PROGRESS,
        metric=LOSS,
        mode="min",
        max_t=_ALL_PERCENT,
        grace_period=_GRACE_PERCENT,
        reduction_factor=_REDUCTION,
        stop_last_trials=False,
    )
    for trial in ended:
        known = SimpleNamespace(trial_id=f"ended-{trial.trial}", config={NUMBER: trial.trial})
        scheduler.on_trial_add(None, known)
        for epoch, loss in enumerate(trial.epoch_losses, start=1):
            metrics = {PROGRESS: _ALL_PERCENT * epoch / trial.values.epochs, LOSS: loss}
            scheduler.on_trial_result(None, known, metrics)
    return scheduler


class _KeepsRecipe(ASHAScheduler):  # type: ignore[misc]
    """ASHA over the percentage of the epochs, which never stops the trial with the values of the recipe.

    Trials with different numbers of epochs are compared at the same point of their learning rate schedules.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial continues, from the metrics that it reported."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config[NUMBER] == RECIPE_TRIAL else action


class _Local:
    """An object of this process in the configuration of Ray Tune, which writes it to a file but never reads it back."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class StopWhen(_Local, tune.Stopper):  # type: ignore[misc]
    """Ends the search when `is_stopping` returns true."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        """Return false: the scheduler alone stops a trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether the search ends."""
        return self._is_stopping()


class TrialCallbacks(_Local, tune.Callback):  # type: ignore[misc]
    """Passes the events of Ray Tune to the search."""

    def __init__(self, listener: TrialListener) -> None:
        self._listener = listener

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Pass on a report of a trial."""
        self._listener.on_result(trial.config[NUMBER], result)

    def on_trial_complete(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Pass on that a trial has ended or was stopped."""
        self._listener.on_end(trial.config[NUMBER], trial.last_result, None)

    def on_trial_error(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Pass on that a trial has failed for good; a failure that is retried is no error here."""
        self._listener.on_end(trial.config[NUMBER], None, _error_of(trial))


def _error_of(trial: Any) -> BaseException:
    """Return the error of the last failure of a trial: that of batchcls if it raised one, or the original one.

    Ray Tune keeps it only in a file of this process.
    """
    if trial.pickled_error_file is None:
        return RuntimeError("Ray Tune did not start it")
    error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    while not isinstance(error, BatchclsError):
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None:
            break
        error = cause
    return error
