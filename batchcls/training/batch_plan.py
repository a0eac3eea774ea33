"""Plans the global batch size, the scaled learning rates and the maximum number of workers.

The plan is created when a run starts and stored in its record, so that a resumed run has the same steps with any
number of workers. Symbols: N training images, B images of a step, W workers.
"""

import logging
from dataclasses import dataclass, replace

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.training.recipe import Recipe
from batchcls.training.sampling import count_steps
from batchcls.training.scaling import Workers

# Minimum steps of an epoch if the batch grows with the number of GPUs. With fewer, a small catalog is not learned.
_MIN_STEPS = 32

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How an epoch is split into steps.

    Attributes:
        batch_size: images of a step, B.
        min_step_size: minimum number of images of a step, for the initial number of workers.
        growth: B divided by the batch size of the recipe if it depends on the workers, otherwise 1.
    """

    batch_size: int
    min_step_size: int
    growth: float = 1.0

    def smallest_step_size(self, rows: int) -> int:
        """Return the number of images of the smallest step of an epoch with `rows` images."""
        return rows // count_steps(rows, self.batch_size, self.min_step_size)

    def applied_to(self, recipe: Recipe, config: FinetuneConfig) -> Recipe:
        """Return the recipe scaled to this batch size. Learning rates that are set by a flag are not scaled.

        Learning rates are proportional to B for SGD (Goyal et al., "Accurate, Large Minibatch SGD", 2017) and to the
        square root of B for AdamW (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms",
        2022). The decay per image of the moving average is constant (Busbridge et al., "How to Scale Your EMA", 2023).
        """
        factor = self.growth if recipe.optimizer == "sgd" else self.growth**0.5
        changes: dict[str, object] = {"batch_size": self.batch_size}
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(config, name) is None:
                changes[name] = getattr(recipe, name) * factor
        if recipe.ema_decay is not None:
            changes["ema_decay"] = recipe.ema_decay**self.growth
        return recipe.with_changes(**changes)


def plan_steps(
    config: FinetuneConfig, recipe: Recipe, workers: Workers, rows: int, min_micro_batch_size: int
) -> StepPlan:
    """Return the plan of a new run.

    Args:
        config: settings of the command, with --batch-size or --worker-batch-size.
        recipe: recipe with its own batch size.
        workers: initial workers.
        rows: number of training images, N.
        min_micro_batch_size: see `optimizer.min_micro_batch_size`.
    """
    batch_size = recipe.batch_size
    if config.worker_batch_size != "auto":
        batch_size = config.worker_batch_size * workers.available
    elif config.batch_size is None and workers.use_gpu:
        batch_size = max(batch_size, min(batch_size * workers.available, rows // _MIN_STEPS))
    growth = batch_size / recipe.batch_size
    if growth != 1:
        _logger.info(
            "a step has %d images over %d worker(s), %.3g times the %d of the recipe: learning rates x %.3g",
            batch_size,
            workers.available,
            growth,
            recipe.batch_size,
            growth if recipe.optimizer == "sgd" else growth**0.5,
        )
    return StepPlan(batch_size, min(batch_size, rows, workers.max_workers * min_micro_batch_size), growth)


def limit_workers(
    config: FinetuneConfig, workers: Workers, plan: StepPlan, rows: int, min_micro_batch_size: int
) -> Workers:
    """Return the workers, limited to the number that has enough images in every step.

    Raises:
        InputError: the minimum number of workers is too large for the steps, or the micro-batch size is too small.
    """
    because = " (for its BatchNorm, which updates statistics)" if min_micro_batch_size > 1 else ""
    if config.micro_batch_size is not None and config.micro_batch_size < min_micro_batch_size:
        raise InputError(
            f"--micro-batch-size {config.micro_batch_size}: a micro-batch needs {min_micro_batch_size} "
            f"images{because}; set --micro-batch-size {min_micro_batch_size} or more"
        )
    smallest_size = plan.smallest_step_size(rows)
    max_workers = smallest_size // min_micro_batch_size
    if max_workers >= workers.max_workers:
        return workers
    explanation = (
        f"the smallest step has {smallest_size} images of {rows} at a batch size of {plan.batch_size}, and a worker "
        f"needs {min_micro_batch_size}{because}"
    )
    if max_workers < workers.min_workers:
        remedy = "increase --batch-size" if rows > plan.batch_size else "train on more images"
        if max_workers >= 1:
            remedy = f"set --min-workers {max_workers} or fewer, or {remedy}"
        elif min_micro_batch_size > 1:
            remedy = f"set --batch-norm frozen, or {remedy}"
        raise InputError(f"--min-workers {config.min_workers}: {explanation}; {remedy}")
    _logger.info("at most %d worker(s) instead of %d: %s", max_workers, workers.max_workers, explanation)
    return replace(workers, max_workers=max_workers, available=min(workers.available, max_workers))
