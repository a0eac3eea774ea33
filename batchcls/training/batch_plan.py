"""Plans the global batch size, the scaled learning rates and the maximum number of workers.

A plan is made once, when a run begins, and kept in its record: whoever resumes the run, on however many workers,
takes the same steps. Arithmetic only. Letters: N training images, B images of a step, W workers.
"""

import logging
from dataclasses import dataclass, replace

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.training.recipe import Recipe
from batchcls.training.sampling import count_steps
from batchcls.training.scaling import Workers

# A batch that grows with the GPUs leaves an epoch at least so many steps: with fewer, a small catalog is not learned.
_LEAST_STEPS = 32

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How an epoch is cut into steps.

    Attributes:
        batch_size: B.
        least: images that every step has at least, for the workers that the run began with.
        growth: B over the recipe's own batch size, where it follows from the workers; else 1.
    """

    batch_size: int
    least: int
    growth: float = 1.0

    def smallest_step_size(self, rows: int) -> int:
        """Images of the smallest step of an epoch of so many images."""
        return rows // count_steps(rows, self.batch_size, self.least)

    def applied_to(self, recipe: Recipe, config: FinetuneConfig) -> Recipe:
        """The recipe at this batch size; rates that are set by a flag are taken as they are.

        Learning rates grow with B as `B` for SGD (Goyal et al., "Accurate, Large Minibatch SGD", 2017) and as the
        root of B for AdamW (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms",
        2022). A moving average forgets as much an image (Busbridge et al., "How to Scale Your EMA", 2023).
        """
        factor = self.growth if recipe.optimizer == "sgd" else self.growth**0.5
        changes: dict[str, object] = {"batch_size": self.batch_size}
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(config, name) is None:
                changes[name] = getattr(recipe, name) * factor
        if recipe.ema_decay is not None:
            changes["ema_decay"] = recipe.ema_decay**self.growth
        return recipe.with_changes(**changes)


def plan_steps(config: FinetuneConfig, recipe: Recipe, workers: Workers, rows: int, needed: int) -> StepPlan:
    """The plan of a run that begins.

    Args:
        config: --batch-size or --worker-batch-size, if one is given.
        recipe: with its own batch size.
        workers: that the run begins with.
        rows: N.
        needed: images of a step that each worker needs, see `freeze.min_micro_batch_size`.
    """
    batch = recipe.batch_size
    if config.worker_batch_size != "auto":
        batch = config.worker_batch_size * workers.now
    elif config.batch_size is None and workers.use_gpu:
        batch = max(batch, min(batch * workers.now, rows // _LEAST_STEPS))
    growth = batch / recipe.batch_size
    if growth != 1:
        _logger.info(
            "a step is %d images over %d worker(s), %.3g times the recipe's %d: learning rates x %.3g",
            batch,
            workers.now,
            growth,
            recipe.batch_size,
            growth if recipe.optimizer == "sgd" else growth**0.5,
        )
    return StepPlan(batch, min(batch, rows, workers.most * needed), growth)


def limit_workers(
    config: FinetuneConfig, workers: Workers, plan: StepPlan, rows: int, needed: int
) -> Workers:
    """The workers that find enough to do in every step: all of them, or fewer where the number was left to us.

    Raises:
        InputError: a number of workers that was asked for is too large for the steps, or a pass too small.
    """
    why = " (for its BatchNorm, which gathers statistics)" if needed > 1 else ""
    if config.micro_batch_size is not None and config.micro_batch_size < needed:
        raise InputError(
            f"--micro-batch-size {config.micro_batch_size}: a pass needs {needed} images{why}; "
            f"give --micro-batch-size {needed} or more"
        )
    smallest = plan.smallest_step_size(rows)
    most = smallest // needed
    if most >= workers.most:
        return workers
    what = (
        f"the smallest step has {smallest} images of {rows} at a batch of {plan.batch_size}, and a worker needs "
        f"{needed}{why}"
    )
    if most < workers.least and (config.num_workers != "auto" or most < 1):
        remedy = "raise --batch-size" if rows > plan.batch_size else "train on more images"
        if most >= 1:
            remedy = f"give --num-workers {most} or fewer, or {remedy}"
        elif needed > 1:
            remedy = f"give --batch-norm frozen, or {remedy}"
        raise InputError(f"--num-workers {config.num_workers}: {what}; {remedy}")
    _logger.info("%d worker(s) instead of %d: %s", most, workers.most, what)
    return replace(workers, least=min(workers.least, most), most=most, now=min(workers.now, most))
