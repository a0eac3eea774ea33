"""Configuration that training workers receive in addition to the recipe."""

from dataclasses import dataclass
from typing import Any, Literal

from batchcls.preprocessing import Preprocessing
from batchcls.storage.filesystem import Storage
from batchcls.training.recipe import Recipe
from batchcls.training.sampling import BalanceName, LabeledRows

CHECKPOINT = "training.pt"
"""File of a checkpoint that holds the state of a training."""

Record = dict[str, Any]
"""What is known of an epoch, as JSON values: see `loop.EpochRecord`."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """All that decides what training ends in, beside the start weights and the pixels.

    `loader_processes` changes the seconds only, and so does `micro_batch_size` but for what is drawn for each pass:
    which images are mixed, dropout, and the statistics of a trained BatchNorm. None: a worker's share of a step at
    once. `min_step_size` and `min_micro_batch_size` are the images that a step, and a pass of a worker, has at least.
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
    min_step_size: int = 1
    min_micro_batch_size: int = 1


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """Which of how many workers a process is, and on which device it computes ("cpu", "cuda:0")."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Assignment:
    """All that a worker is given.

    Attributes:
        settings: of the training.
        bundle: reference to the `Bundle` that training starts from.
        training, validation: URIs of the parts with the pixels, in the order of the rows.
        storage: how to reach the work directory.
        run_id: of the run.
        checkpoint_seconds: longest time between two checkpoints.
        copies: whether the parts lie on a store, so that each node has copies.
        threads: of a worker on a CPU.
        curves: folder of the TensorBoard files.
        board: the actor that the driver watches.
    """

    settings: TrainingSettings
    bundle: Any
    training: tuple[str, ...]
    validation: tuple[str, ...]
    storage: Storage
    run_id: str
    copies: bool
    checkpoint_seconds: float
    threads: int
    curves: str
    board: Any
