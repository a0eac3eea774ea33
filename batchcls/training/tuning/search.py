"""Runs the trials of `--tune` with Ray Tune, and chooses the recipe of the final training.

Ray Tune places one process per trial, as many at once as fit into the cluster, and stops trials early with ASHA. What
outlasts a command is not the state of Ray Tune but the table of trials and the checkpoints in the work directory: a
later command starts only the trials that have not ended, each of them from its checkpoint (docs/decisions/043).
"""

import hashlib
import io
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from batchcls.cli.console import show_progress
from batchcls.config.finetune_config import RECIPE_FLAGS, FinetuneConfig
from batchcls.errors import BatchclsError, InputError
from batchcls.models.model_bundle import Bundle
from batchcls.ray_runtime import WORKER_VARIABLES
from batchcls.storage.filesystem import is_remote, join
from batchcls.storage.store_errors import resumable_errors
from batchcls.training.failures import one_line
from batchcls.training.held_out import require_tuning_rows
from batchcls.training.node_storage import remove_node_caches
from batchcls.training.pixel_preparation import PreparedPixels
from batchcls.training.ray_train import SPIN_BEFORE_SLEEP, TrainingRun
from batchcls.training.sampling import hold_out
from batchcls.training.scaling import Workers
from batchcls.training.train_config import TrainingSettings
from batchcls.training.train_inputs import TrainingInputs
from batchcls.training.training_progress import TrainingProgress, TrialsProgressActor
from batchcls.training.tuning.search_space import RECIPE_TRIAL, TrialValues, trial_values
from batchcls.training.tuning.trial_worker import TrialAssignment, losses_uri
from batchcls.training.tuning.trials import (
    TUNING_FILE,
    Trial,
    TrialStatus,
    TuningChoice,
    choose,
    read_trials,
    write_trials,
)
from batchcls.training.tuning.tune_hooks import NUMBER, StopWhen, TrialCallbacks, trial_scheduler
from batchcls.training.work_dir import digest_of

# Ray Tune writes neither result files nor to the terminal, because the table of trials and the log contain the results.
# A trial keeps the working directory of its node.
_TUNE_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

# How long a process waits for the end of a stopped trial before it starts the next one. By default, the next trial
# would fail after two seconds.
_REUSE_TIMEOUT = {"TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}

_ENDED = ("finished", "stopped", "diverged")
"""Status of the trials that a later command does not repeat."""

_CHECK_SECONDS, _STOP_SECONDS = 1.0, 20.0

_logger = logging.getLogger(__name__)


def tuned(
    config: FinetuneConfig,
    inputs: TrainingInputs,
    settings: TrainingSettings,
    pixels: PreparedPixels,
    workers: Workers,
    run: TrainingRun,
) -> tuple[TrainingSettings, TuningChoice]:
    """Run the trials that have not ended, and return the settings of the final training and why.

    Args:
        config: settings of the command, with --tune.
        inputs: inputs of the command.
        settings: settings of the final training with the recipe of the command.
        pixels: prepared pixels of the training rows.
        workers: workers of the final training; a trial has the resources of one of them.
        run: the run that the search belongs to.

    Raises:
        InputError: fewer rows than categories can be held out, or the recipe cannot be trained.
        BatchclsError: the trial with the values of the recipe failed or diverged.
        LeaseLostError: another process has locked the work directory.
    """
    assert config.tune is not None
    fraction, seed = config.tuning_fraction, config.seed
    require_tuning_rows(settings.training.targets, fraction, seed)
    training, held_out = hold_out(settings.training, fraction, seed)
    # Per step, as many images are mixed with each other as in the final training.
    micro_batch_size = settings.micro_batch_size or -(-settings.recipe.batch_size // workers.available)
    trial_settings = replace(
        settings,
        training=training,
        validation=held_out,
        held_out=None,
        patience=None,
        micro_batch_size=max(micro_batch_size, settings.min_micro_batch_size),
    )
    fixed = [name for name in RECIPE_FLAGS if getattr(config, name) is not None]
    if micro_batch_size < 2:
        fixed.append("mixup")
    values = trial_values(settings.recipe, config.tune, seed, fixed)
    key = _digest(inputs.result_settings(config), trial_settings)
    plan = _Plan(trial_settings, tuple(values), key, join(config.work_folder, "tuning", key))
    if config.restart:
        _discard(config, run)
    search = _Search(config, plan, inputs.initial_bundle, pixels, workers, run)
    search.run()
    choice = choose(search.trials.values())
    _logger.info("tuning: %s", choice)
    return replace(settings, recipe=choice.chosen.applied_to(settings.recipe)), choice


def _discard(config: FinetuneConfig, run: TrainingRun) -> None:
    """Remove the table and the checkpoints of earlier searches."""
    table = join(config.work_folder, TUNING_FILE)
    with resumable_errors(table):
        if run.storage.exists(table):
            run.storage.remove([table])
        run.storage.remove_folder(join(config.work_folder, "tuning"))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the trials of a search do.

    Attributes:
        settings: settings of a trial with the recipe of the command; its validation rows are the held-out rows.
        values: values of all trials, in order of their numbers.
        key: identifies what the losses depend on besides the values.
        folder: URI of the folder for checkpoints and losses.
    """

    settings: TrainingSettings
    values: tuple[TrialValues, ...]
    key: str
    folder: str


class _Search:
    """The trials of a run; `trials` contains those that have ended."""

    def __init__(
        self,
        config: FinetuneConfig,
        plan: _Plan,
        initial_bundle: Bundle,
        pixels: PreparedPixels,
        workers: Workers,
        run: TrainingRun,
    ) -> None:
        self._config, self._plan, self._bundle = config, plan, initial_bundle
        self._pixels, self._workers, self._run = pixels, workers, run
        self._uri = join(config.work_folder, TUNING_FILE)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self.trials = self._known()

    def run(self) -> None:
        """Run the trials that have not ended, and remove their checkpoints at the end."""
        open_trials = [number for number in self._numbers() if number not in self.trials]
        if open_trials:
            self._run_trials(open_trials)
        else:
            _logger.info("tuning: the %d trials have ended before", len(self._plan.values))
        folder = join(self._config.work_folder, "tuning")
        with resumable_errors(folder):
            self._run.storage.remove_folder(folder)

    def _run_trials(self, open_trials: list[int]) -> None:
        _logger.info(
            "tuning: %d of %d trials, each on %d images, compared on %d held-out images; %s per trial",
            len(open_trials),
            len(self._plan.values),
            len(self._plan.settings.training.rows),
            len(self._plan.settings.validation.rows),
            ", ".join(f"{amount:g} {name}" for name, amount in self._workers.resources.items()),
        )
        copies = is_remote(self._config.work_folder)
        try:
            self._fit(open_trials, copies=copies)
            self._require_recipe()
        except BaseException:
            if copies:
                remove_node_caches(self._run.run_id, self._run.placement)
            raise

    def _numbers(self) -> range:
        return range(1, len(self._plan.values) + 1)

    def _known(self) -> dict[int, Trial]:
        """Return the trials of earlier commands that ended with the values of this search."""
        found = read_trials(self._uri, self._plan.key, self._run.storage)
        return {
            number: found[number]
            for number in self._numbers()
            if number in found
            and found[number].status in (("finished",) if number == RECIPE_TRIAL else _ENDED)
            and found[number].values == self._plan.values[number - 1]
        }

    def _fit(self, open_trials: list[int], *, copies: bool) -> None:
        """Run trials with Ray Tune, in another thread: in the main thread, it would replace the handler of SIGINT."""
        rows = len(self._plan.settings.training.rows)
        totals = {number: self._plan.values[number - 1].epochs * rows for number in open_trials}
        on_driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        progress_actor = ray.remote(num_cpus=0, scheduling_strategy=on_driver_node)(
            TrialsProgressActor
        ).remote()

        def progress() -> TrainingProgress:
            found: Mapping[int, int] = ray.get(progress_actor.rows.remote())
            return TrainingProgress(
                sum(
                    total if number in self.trials else found.get(number, 0)
                    for number, total in totals.items()
                )
            )

        assignment = TrialAssignment(
            settings=self._plan.settings,
            values=self._plan.values,
            bundle=ray.put(self._bundle),
            teachers=ray.put(self._run.teachers),
            pixels=self._pixels.uris,
            storage=self._run.storage,
            run_id=self._run.run_id,
            copies=copies,
            threads=self._workers.threads,
            use_gpu=self._workers.use_gpu,
            checkpoint_seconds=self._config.checkpoint_minutes * 60,
            folder=self._plan.folder,
            progress_actor=progress_actor,
        )
        for name, value in _TUNE_VARIABLES.items():
            os.environ.setdefault(name, value)
        state_folder = tempfile.mkdtemp(prefix="batchcls-tune-")
        executor = ThreadPoolExecutor(1)
        try:
            with show_progress(
                progress, sum(totals.values()), self._run.console, self._config.log_interval_seconds, "tune"
            ):
                result = executor.submit(self._tuner(open_trials, assignment, state_folder).fit)
                try:
                    while not result.done():
                        wait([result], timeout=_CHECK_SECONDS)
                        self._run.lease.check()
                finally:
                    self._stopping.set()
                    wait([result], timeout=_STOP_SECONDS)
                result.result()
        finally:
            executor.shutdown(wait=False)
            shutil.rmtree(state_folder, ignore_errors=True)

    def _tuner(self, open_trials: list[int], assignment: TrialAssignment, state_folder: str) -> tune.Tuner:
        variables = WORKER_VARIABLES | SPIN_BEFORE_SLEEP | _REUSE_TIMEOUT

        # Pickled by value: a reference to a module would make Ray Tune's own code import the networks, too.
        def trial(config: dict[str, int], assignment: TrialAssignment) -> None:
            os.environ.update(variables)  # before PyTorch is imported, which reads them
            from batchcls.training.tuning.trial_worker import run_trial  # noqa: PLC0415

            run_trial(config["trial"], assignment)

        resources = tune.PlacementGroupFactory(
            [self._workers.resources], bundle_label_selector=[dict(self._run.placement.job)]
        )
        return tune.Tuner(
            tune.with_resources(tune.with_parameters(trial, assignment=assignment), resources),
            param_space={NUMBER: tune.grid_search(open_trials)},
            # The next trial of a process does not have to import PyTorch again.
            tune_config=tune.TuneConfig(scheduler=trial_scheduler(self.trials.values()), reuse_actors=True),
            run_config=tune.RunConfig(
                name="search",
                storage_path=state_folder,
                failure_config=tune.FailureConfig(max_failures=self._config.max_failures),
                stop=StopWhen(self._stopping.is_set),
                callbacks=[TrialCallbacks(self)],
                verbose=0,
            ),
        )

    def on_result(self, number: int, result: Mapping[str, Any]) -> None:
        """Log an epoch of a trial."""
        losses, epochs = result["epoch_losses"], self._plan.values[number - 1].epochs
        if not result["has_diverged"]:
            _logger.info(
                "trial %d of %d: epoch %d of %d, held-out loss %.3f, %.1f%% correct, %.0f s",
                number,
                len(self._plan.values),
                len(losses),
                epochs,
                losses[-1],
                100 * result["held_out_top1"],
                result["seconds"],
            )

    def on_end(self, number: int, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        """Record a trial that has ended, unless the search was interrupted, so that a later command resumes it."""
        if self._stopping.is_set():
            return
        values = self._plan.values[number - 1]
        if error is not None:
            _logger.warning("trial %d of %d failed: %s", number, len(self._plan.values), one_line(error))
            trial = Trial(trial=number, status="failed", values=values)
            if number == RECIPE_TRIAL:
                self._failure = error
                self._stopping.set()
        else:
            assert result is not None
            trial = self._ended(number, values, result)
            _logger.info(
                "trial %d of %d %s after %d of %d epochs",
                number,
                len(self._plan.values),
                trial.status,
                len(trial.epoch_losses),
                values.epochs,
            )
            if number == RECIPE_TRIAL and trial.status == "diverged":
                self._stopping.set()
        self.trials[number] = trial
        write_trials(self._uri, self.trials, self._plan.key, self._run.storage)

    def _ended(self, number: int, values: TrialValues, result: Mapping[str, Any]) -> Trial:
        losses, row_losses = tuple(result["epoch_losses"]), None
        status: TrialStatus = "stopped"
        if result["has_diverged"]:
            status = "diverged"
        elif len(losses) == values.epochs:
            uri = losses_uri(self._plan.folder, number)
            with resumable_errors(uri):
                row_losses = tuple(np.load(io.BytesIO(self._run.storage.read_bytes(uri))).tolist())
            status = "finished"
        return Trial(
            trial=number,
            status=status,
            values=values,
            held_out_loss=losses[-1] if losses else None,
            held_out_top1=result["held_out_top1"],
            seconds=result["seconds"],
            epoch_losses=losses,
            row_losses=row_losses,
        )

    def _require_recipe(self) -> None:
        """Raise an error unless the trial with the values of the recipe is finished."""
        if isinstance(self._failure, InputError):
            raise InputError(str(self._failure))
        if self._failure is not None:
            raise BatchclsError(
                f"tuning stopped, because the trial with the values of the recipe failed: {one_line(self._failure)}; "
                "the same command resumes"
            )
        if self.trials[RECIPE_TRIAL].status == "diverged":
            raise BatchclsError(
                "tuning stopped, because training diverged with the values of the recipe; reduce --learning-rate and "
                "--head-learning-rate, or omit --tune, which names the images of the step"
            )


def _digest(result_settings: Mapping[str, Any], settings: TrainingSettings) -> str:
    """Identify what the losses of a trial depend on besides its values. The number of trials is no part of it."""
    kept = {name: value for name, value in result_settings.items() if name not in ("recipe", "tune")}
    recipe = settings.recipe.model_dump(mode="json", exclude={*TrialValues.model_fields, "crop_scale"})
    parts = (settings.training, settings.validation)
    rows = [hashlib.sha256(part.rows.tobytes() + part.targets.tobytes()).hexdigest() for part in parts]
    return digest_of(
        kept
        | {"recipe": recipe, "largest crop": settings.recipe.crop_scale[1]}
        | {"rows": rows, "precision": settings.precision}
    )
