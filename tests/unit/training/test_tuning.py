"""The search space, the choice between trials, the table of trials and the scheduler of `--tune`, without a cluster."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray.tune.schedulers import TrialScheduler

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage
from batchcls.training.held_out import held_out_mask, require_tuning_rows
from batchcls.training.recipe import read_recipe, recipe_names
from batchcls.training.sampling import LabeledRows
from batchcls.training.tuning.search_space import TrialValues, trial_values
from batchcls.training.tuning.trials import Trial, choose, ranked, read_trials, write_trials
from batchcls.training.tuning.tune_hooks import LOSS, PROGRESS, trial_scheduler
from tests.helpers.training import settings, train, write_stores

RECIPE = read_recipe("fine-tune")
VALUES = trial_values(RECIPE, 4, seed=0)


def finished(number: int, losses: list[float], top1: float = 0.5) -> Trial:
    return Trial(
        trial=number,
        status="finished",
        values=VALUES[number - 1],
        held_out_loss=float(np.mean(losses)),
        held_out_top1=top1,
        seconds=1.0,
        epoch_losses=(float(np.mean(losses)),) * VALUES[number - 1].epochs,
        row_losses=tuple(losses),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_all_trials_are_valid_recipes_around_the_given_one(name: str):
    recipe = read_recipe(name)
    values = trial_values(recipe, 64, seed=3)
    assert values[0].applied_to(recipe) is recipe
    assert len({value.model_dump_json() for value in values}) == 64
    for value in values[1:]:
        made = value.applied_to(recipe)
        assert TrialValues.of(made) == value
        assert recipe.learning_rate / 4.1 < made.learning_rate < recipe.learning_rate * 4.1
        assert made.crop_scale[1] == recipe.crop_scale[1]
        assert made.weight_decay == recipe.weight_decay
    for field in ("epochs", "mixup", "color_jitter", "label_smoothing"):
        found = {getattr(value, field) for value in values}
        assert len(found) >= 3, "every choice occurs"
        assert getattr(values[0], field) in found
    rates = np.log([value.learning_rate / recipe.learning_rate for value in values[1:]])
    assert abs(np.median(rates)) < 0.3, "as many below as above the learning rate of the recipe"


def test_longer_search_contains_a_shorter_one_and_the_seed_changes_it():
    assert trial_values(RECIPE, 9, seed=0)[:4] == VALUES
    assert trial_values(RECIPE, 4, seed=1)[1:] != VALUES[1:]


def test_fixed_settings_keep_the_value_of_the_recipe():
    for value in trial_values(RECIPE, 8, seed=0, fixed=["epochs", "batch_size", "mixup"])[1:]:
        assert (value.epochs, value.mixup) == (RECIPE.epochs, RECIPE.mixup)
        assert value.learning_rate != RECIPE.learning_rate


@pytest.mark.parametrize(
    ("others", "best", "chosen"),
    [
        # Lower in every row by almost the same amount: a small difference with a much smaller error.
        ([[0.9, 2.9, 0.39, 1.9]], 2, 2),
        # The same mean difference, but from a single row: within the error.
        ([[1.0, 3.0, 0.5, 1.6]], 2, 1),
        ([[1.5, 3.5, 1.0, 2.5]], 1, 1),
        ([[0.9, 2.9, 0.39, 1.9], [0.8, 2.8, 0.31, 1.8]], 3, 3),
    ],
)
def test_best_trial_is_chosen_if_it_is_better_by_more_than_its_paired_error(others, best, chosen):
    recipe = finished(1, [1.0, 3.0, 0.5, 2.0])
    choice = choose([finished(number, losses) for number, losses in enumerate(others, start=2)] + [recipe])
    assert (choice.best_trial, choice.chosen_trial) == (best, chosen)
    assert choice.chosen == VALUES[chosen - 1]
    differences = np.array([1.0, 3.0, 0.5, 2.0]) - ([1.0, 3.0, 0.5, 2.0] if best == 1 else others[best - 2])
    assert choice.gain == pytest.approx(differences.mean())
    assert choice.gain_error == pytest.approx(differences.std(ddof=1) / 2)
    assert ("are kept" in str(choice)) == (chosen == 1)


def test_trials_that_did_not_finish_are_never_chosen():
    stopped = Trial(trial=2, status="stopped", values=VALUES[1], held_out_loss=0.01, epoch_losses=(0.01,))
    diverged = Trial(trial=3, status="diverged", values=VALUES[2])
    choice = choose([finished(1, [1.0, 2.0]), stopped, diverged])
    assert choice.chosen_trial == 1
    assert choice.trials == {"diverged": 1, "finished": 1, "stopped": 1}
    assert [trial.trial for trial in ranked([diverged, stopped, finished(1, [1.0, 2.0])])] == [1, 2, 3]


def test_table_is_read_back_by_the_same_search_only(tmp_path: Path):
    uri, storage = str(tmp_path / "tuning.parquet"), Storage()
    assert read_trials(uri, "key", storage) == {}
    trials = {
        1: finished(1, [1.0, 2.0]),
        2: Trial(trial=2, status="stopped", values=VALUES[1], held_out_loss=3.0, epoch_losses=(4.0, 3.0)),
        3: Trial(trial=3, status="diverged", values=VALUES[2]),
        4: finished(4, [0.5, 1.75]),
    }
    write_trials(uri, trials, "key", storage)
    assert read_trials(uri, "key", storage) == trials
    assert read_trials(uri, "other", storage) == {}
    rows = pq.read_table(uri).to_pylist()
    assert [row["gain"] for row in rows] == [0, None, None, 0.375]
    (tmp_path / "tuning.parquet").write_bytes(b"PAR1")
    assert read_trials(uri, "key", storage) == {}


def reported(scheduler, number: int, progress: float, loss: float) -> str:
    trial = SimpleNamespace(trial_id=f"trial-{number}", config={"trial": number})
    if trial.trial_id not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {PROGRESS: progress, LOSS: loss})


def test_scheduler_stops_bad_trials_but_not_the_recipe_and_knows_earlier_trials():
    stop, proceed = TrialScheduler.STOP, TrialScheduler.CONTINUE
    scheduler = trial_scheduler([])
    assert reported(scheduler, 2, 40, 0.5) == proceed
    assert reported(scheduler, 1, 40, 0.9) == proceed, "the recipe always has all of its epochs"
    assert reported(scheduler, 3, 20, 9.0) == proceed, "too early to decide"
    assert reported(scheduler, 3, 40, 1.0) == stop
    assert reported(scheduler, 4, 40, 0.4) == proceed
    # A command that resumes the search decides with the trials that have ended before.
    assert reported(trial_scheduler([]), 3, 50, 1.4) == proceed
    assert reported(trial_scheduler([finished(1, [1.0, 1.5])]), 3, 50, 1.4) == stop


def test_as_many_rows_as_categories_are_held_out():
    classes = np.repeat(np.arange(10, dtype=np.int32), 10)
    require_tuning_rows(classes, 0.2, seed=0)
    found = np.bincount(classes[held_out_mask(classes, 0.2, seed=0)], minlength=10)
    assert set(found) <= {1, 2}, "a fifth of each category, without the row that is always trained on"
    with pytest.raises(InputError, match=r"on 0 held-out images of 10, fewer than the 10 categories"):
        require_tuning_rows(np.arange(10, dtype=np.int32), 0.2, seed=0)


def test_losses_of_rows_have_the_mean_of_the_evaluation(tmp_path: Path):
    """A trial trains on a part of the training rows, with the others as its validation rows."""
    stores, plain = write_stores(tmp_path), settings()
    rows, targets = plain.training.rows, plain.training.targets
    held_out = LabeledRows(rows[-8:], targets[-8:])
    trial = settings(training=LabeledRows(rows[:-8], targets[:-8]), validation=held_out)
    training, diverged, _ = train(trial, (stores[0], stores[0]))
    assert diverged is None
    losses = training.evaluate_rows(stores[0], held_out)
    assert losses.shape == (8,)
    assert losses.mean() == pytest.approx(training.history[-1]["validation_loss"], rel=1e-5)
