"""Configuration that training workers receive in addition to the recipe."""

from dataclasses import dataclass
from typing import Any, Literal

from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from batchcls.training.recipe import Recipe
from batchcls.training.sampling import BalanceName, LabeledRows

CHECKPOINT = "training.pt"
"""File in a checkpoint with the state of the training."""

Record = dict[str, Any]
"""Metrics of an epoch as JSON values, see `trainer.Training`."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Settings that determine the result of training, together with the initial weights and the pixels.

    Attributes:
        recipe: recipe with the batch size of the plan.
        preprocessing: preprocessing of the network.
        classes: number of classes, K.
        trainable: glob patterns of the trainable parameters.
        training: training rows.
        validation: validation rows.
        balance: compensation of unequal category sizes.
        seed: seed of all random numbers.
        micro_batch_size: maximum images of a micro-batch; None: a worker's whole share of a step. It affects only what
            is computed per micro-batch: mixing, dropout, and the statistics of a trained BatchNorm.
        precision: arithmetic of forward and backward passes.
        loader_processes: number of loader processes of each worker; affects only the speed.
        held_out: training rows that are not trained on and select the epoch whose weights are kept; None: the weights
            of the last epoch are kept. They are rows of the training pixels.
        patience: number of epochs without a lower loss on `held_out` after which training ends; None: no limit.
        min_step_size: minimum images of a step.
        min_micro_batch_size: minimum images of a micro-batch.
    """

    recipe: Recipe
    preprocessing: Preprocessing
    classes: int
    trainable: tuple[str, ...]
    training: LabeledRows
    validation: LabeledRows
    balance: BalanceName
    seed: int
    micro_batch_size: int | None
    precision: Literal["fp32", "bf16"]
    loader_processes: int
    held_out: LabeledRows | None = None
    patience: int | None = None
    min_step_size: int = 1
    min_micro_batch_size: int = 1


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """Rank of the process, number of workers, and the device of the process ("cpu", "cuda:0")."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Assignment:
    """Everything that a worker needs.

    Attributes:
        settings: settings of the training.
        bundle: Ray reference to the initial bundle.
        teachers: Ray reference to a tuple of `teacher_bundles.TeacherBundle`; empty: no distillation.
        training: URIs of the pixel parts of the training rows, in row order.
        validation: URIs of the pixel parts of the validation rows, in row order.
        storage: storage that holds the work directory.
        run_id: ID of the run.
        checkpoint_seconds: maximum time between two checkpoints.
        copies: whether the parts are on a remote store, so that each node copies them.
        threads: number of threads of a worker on CPUs.
        curves: folder of the TensorBoard files.
        progress_actor: handle of the `TrainingProgressActor`.
    """

    settings: TrainingSettings
    bundle: Any
    teachers: Any
    training: tuple[str, ...]
    validation: tuple[str, ...]
    storage: Storage
    run_id: str
    copies: bool
    checkpoint_seconds: float
    threads: int
    curves: str
    progress_actor: Any
