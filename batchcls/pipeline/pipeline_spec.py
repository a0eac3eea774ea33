"""What a pipeline is given to do, made on the driver and read by the workers. Needs no torch and no ray.data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchcls.hardware import Hardware
from batchcls.images.load_config import LoadSettings
from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Columns, Manifest
from batchcls.models.engines.engine import EngineChoice
from batchcls.models.model_bundle import Bundle
from batchcls.resources import ResourcePlan
from batchcls.runs.parts import PartWriter
from batchcls.storage.filesystem import Storage

if TYPE_CHECKING:  # a worker needs no DuckDB
    from batchcls.manifest.ids import InvalidIds

# A fragment or a block whose process dies is tried again so often and no more: an image that kills
# its process would otherwise be tried for ever.
RETRIES = 3
ACTOR_RESTARTS = 40
"""Processes of an actor; each image that kills its process may cost one."""


@dataclass(frozen=True, slots=True)
class NodeEngine:
    """What runs the network on one kind of node, and in batches of how many images."""

    choice: EngineChoice
    batch_size: int

    def __str__(self) -> str:
        return f"{self.choice}, batches of {self.batch_size}"


@dataclass(frozen=True)
class Engines:
    """What runs the network, wherever an actor is started.

    Attributes:
        by_hardware: for the kinds of nodes that were there when the job began, by `Hardware.key`.
        otherwise: for any other node.
        cache_folder: where nodes keep converted networks; None: see `Conversions.at`.
        calibration: see `EnginePlace.calibration`.
        probe_batches: an actor on a GPU finds out itself how large its batches should be.
    """

    by_hardware: Mapping[str, NodeEngine]
    otherwise: NodeEngine
    cache_folder: str | None
    calibration: Callable[[], NDArray[np.uint8]] | None
    probe_batches: bool = False

    def here(self) -> NodeEngine:
        """The engine for the machine that this process runs on."""
        return self.by_hardware.get(Hardware.here().key, self.otherwise)


@dataclass(frozen=True)
class Load:
    """All that turns a fragment into blocks of pixels, wherever it is done."""

    columns: Columns
    storage: Storage
    settings: LoadSettings


@dataclass(frozen=True)
class PipelineSpec:
    """Everything that the workers need. `todo` are the rows of the manifest that are to be done."""

    manifest: Manifest
    todo: RowRanges
    bad_ids: "InvalidIds"
    load: Load
    predict: PredictSettings
    bundle: Bundle
    engines: Engines
    writer: PartWriter
    placement: ResourcePlan
    no_progress_timeout_seconds: float
