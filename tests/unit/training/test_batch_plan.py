"""Tests for the batch plan: every worker gets enough images in every step, for any rows, batch and workers."""

from itertools import product

import numpy as np
import pytest

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.training.batch_plan import StepPlan, limit_workers, plan_steps
from batchcls.training.recipe import Recipe, read_recipe
from batchcls.training.sampling import RowSampler, count_steps, epoch_steps, micro_batches, worker_share
from batchcls.training.scaling import Workers


def config(**changes: object) -> FinetuneConfig:
    return FinetuneConfig(manifest="m", validation="v", model="x", output="o", **changes)


def workers(most: int, least: int | None = None, *, gpu: bool = False) -> Workers:
    return Workers(most if least is None else least, most, most, 1.0, gpu, 0)


def recipe(batch_size: int, **changes: object) -> Recipe:
    return read_recipe("fine-tune").with_changes(batch_size=batch_size, **changes)


def planned(
    chosen: FinetuneConfig, found: Workers, batch: int, rows: int, needed: int
) -> tuple[StepPlan, Workers]:
    plan = plan_steps(chosen, recipe(batch), found, rows, needed)
    return plan, limit_workers(chosen, found, plan, rows, needed)


def test_every_worker_has_enough_images_in_every_step_of_small_catalogs():
    """1 to 40 rows, batches of 2 to 40, 1 to 40 workers, with and without a BatchNorm that needs two images."""
    shared = refused = 0
    recipes = {batch: recipe(batch) for batch in range(2, 41)}
    for count, needed in product(range(1, 41), (1, 2)):
        chosen, requested = config(min_workers=count, max_workers=count), workers(count)
        for rows, batch in product(range(1, 41), recipes):
            plan = plan_steps(chosen, recipes[batch], requested, rows, needed)
            try:
                found = limit_workers(chosen, requested, plan, rows, needed)
            except InputError:
                refused += 1
                assert count * needed > min(rows, batch), (rows, batch, count, needed)
                continue
            shared += 1
            steps = count_steps(rows, batch, plan.min_step_size)
            smallest, largest = rows // steps, -(-rows // steps)
            assert found.max_workers == count
            assert smallest // count >= needed, (rows, batch, count, needed)
            assert largest <= batch or largest // count < 2 * needed, (
                "a step grows where shares are small only"
            )
    assert shared > 15_000
    assert refused > 15_000


@pytest.mark.parametrize("rows", range(1, 41))
def test_steps_partition_the_rows_and_micro_batches_partition_shares(rows: int):
    sampler = RowSampler(np.zeros(rows, np.int32), seed=3)
    for batch, least, micro_batch_size, needed in product((2, 3, 7, 32), (1, 2, 4), (None, 2, 3, 5), (1, 2)):
        steps = epoch_steps(sampler, 0, batch, min(least, rows))
        assert sorted(np.concatenate(steps)) == list(range(rows))
        for step in steps:
            for count in range(1, len(step) // needed + 1):
                shares = [worker_share(step, rank, count) for rank in range(count)]
                assert sorted(np.concatenate(shares)) == sorted(step)
                cut = [part for share in shares for part in micro_batches(share, micro_batch_size, needed)]
                assert sum(map(len, cut)) == len(step)
                assert min(map(len, cut)) >= needed
                if micro_batch_size is not None:
                    assert max(map(len, cut)) <= micro_batch_size + (needed - 1)


def test_21_rows_with_batch_size_2_have_no_step_of_one_image():
    plan, _ = planned(config(min_workers=2), workers(2), 2, 21, 1)
    steps = epoch_steps(RowSampler(np.zeros(21, np.int32), seed=0), 0, plan.batch_size, plan.min_step_size)
    assert sorted(map(len, steps)) == [2] * 9 + [3]
    with pytest.raises(ValueError, match="a step of 1 images cannot be shared among 2 workers"):
        worker_share(np.arange(1), 0, 2)


@pytest.mark.parametrize(
    ("chosen", "found", "rows", "needed", "message"),
    [
        (
            {"min_workers": 64},
            workers(64),
            1000,
            1,
            "--min-workers 64: .* at a batch size of 32.*--min-workers 32 or",
        ),
        (
            {"min_workers": 16},
            workers(16),
            20,
            2,
            "smallest step has 20 images.*needs 2 .for its BatchNorm.*10 or fewer",
        ),
        ({"min_workers": 16, "max_workers": 40}, workers(40, 16), 1000, 4, "--min-workers 8 or fewer"),
        (
            {"min_workers": 2, "micro_batch_size": 1},
            workers(2),
            1000,
            2,
            "--micro-batch-size 1: a micro-batch needs 2 images",
        ),
        ({}, workers(1), 1, 2, "--min-workers auto: .*--batch-norm frozen, or train on more images"),
    ],
)
def test_too_many_requested_workers_are_rejected_with_a_remedy(chosen, found, rows, needed, message):
    with pytest.raises(InputError, match=message):
        planned(config(**chosen), found, 32, rows, needed)


def test_maximum_number_of_workers_is_limited_and_logged(log: pytest.LogCaptureFixture):
    plan, found = planned(config(), workers(64, 1), 32, 1000, 1)
    assert (found.min_workers, found.max_workers, found.available) == (1, 32, 32)
    assert "at most 32 worker(s) instead of 64: the smallest step has 32 images of 1000" in log.text
    assert plan.smallest_step_size(1000) == 32
    _, found = planned(config(min_workers=2, max_workers=64), workers(64, 2), 32, 1000, 1)
    assert (found.min_workers, found.max_workers) == (2, 32)


def test_run_resumed_on_a_larger_machine_keeps_its_steps():
    plan, _ = planned(config(), workers(1), 32, 60, 1)
    found = limit_workers(config(), workers(8, 1), plan, 60, 1)
    assert found.max_workers == 8
    again = limit_workers(config(), workers(64, 1), plan, 60, 1)
    assert again.max_workers == 30


@pytest.mark.parametrize(
    ("chosen", "gpus", "rows", "batch", "growth"),
    [
        ({}, 1, 100_000, 32, 1),
        ({}, 8, 100_000, 256, 8),
        ({}, 8, 4_096, 128, 4),
        ({}, 8, 500, 32, 1),
        ({"batch_size": 64}, 8, 100_000, 32, 1),
        ({"worker_batch_size": 8}, 2, 500, 16, 0.5),
        ({"worker_batch_size": 128}, 8, 100_000, 1024, 32),
    ],
)
def test_batch_size_scales_with_gpus_unless_set_by_a_flag(chosen, gpus, rows, batch, growth):
    plan = plan_steps(config(**chosen), recipe(32), workers(gpus, gpu=True), rows, 1)
    assert (plan.batch_size, plan.growth) == (batch, growth)


def test_batch_size_of_the_recipe_is_used_without_gpus():
    assert plan_steps(config(), recipe(32), workers(8), 100_000, 1).batch_size == 32
    assert plan_steps(config(worker_batch_size=8), recipe(32), workers(8), 100_000, 1).batch_size == 64


def test_learning_rates_scale_with_the_batch_size():
    plan = StepPlan(512, 8, 16.0)
    adam = plan.applied_to(recipe(32, learning_rate=1e-3, ema_decay=0.995), config())
    assert adam.batch_size == 512
    assert adam.learning_rate == pytest.approx(4e-3)
    assert adam.head_learning_rate == pytest.approx(4 * recipe(32).head_learning_rate)
    assert adam.ema_decay == pytest.approx(0.995**16)
    sgd = plan.applied_to(recipe(32, optimizer="sgd", learning_rate=1e-3), config(head_learning_rate=0.5))
    assert sgd.learning_rate == pytest.approx(16e-3)
    assert sgd.head_learning_rate == recipe(32).head_learning_rate
    assert StepPlan(32, 1).applied_to(recipe(32), config()) == recipe(32)


def test_batch_size_flags_are_mutually_exclusive():
    with pytest.raises(ValueError, match="--batch-size and --worker-batch-size exclude each other"):
        config(batch_size=32, worker_batch_size=8)
