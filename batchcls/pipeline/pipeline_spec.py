"""The specification of a pipeline, built on the driver, and the part of it that is sent to every worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchcls.cluster.placement import Placement
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

MAX_RETRIES = 3
"""Retries of a fragment or a block whose worker process crashed; an image may crash every process that decodes it."""

MAX_ACTOR_RESTARTS = 40
"""Restarts of an actor's process; each image that crashes its process may cost one."""


@dataclass(frozen=True, slots=True)
class NodeEngine:
    """The engine of one kind of node, and its batch size in images."""

    choice: EngineChoice
    batch_size: int

    def __str__(self) -> str:
        return f"{self.choice}, batches of {self.batch_size}"


@dataclass(frozen=True)
class Engines:
    """The engine of every node on which an actor may start.

    Attributes:
        by_hardware: engines of the kinds of nodes that the cluster had when the job started, by `Hardware.key`.
        default: engine of any other node.
        cache_folder: folder of compiled networks on each node; None: see `CompileCache.from_cache_dir`.
        calibration: see `EngineConfig.calibration`.
        probe_batches: whether an actor on a GPU measures its own batch size at start-up.
    """

    by_hardware: Mapping[str, NodeEngine]
    default: NodeEngine
    cache_folder: str | None
    calibration: Callable[[], NDArray[np.uint8]] | None
    probe_batches: bool = False

    def for_this_node(self) -> NodeEngine:
        """Return the engine for the node on which this process runs."""
        return self.by_hardware.get(Hardware.detect().key, self.default)

    def unmeasured_hardware(self) -> str:
        """Return the hardware of this node if its engine was not measured, but that of other nodes; otherwise ""."""
        hardware = Hardware.detect()
        return str(hardware) if self.by_hardware and hardware.key not in self.by_hardware else ""


@dataclass(frozen=True)
class LoadSpec:
    """Everything that turns a fragment of the manifest into blocks of decoded images."""

    columns: Columns
    storage: Storage
    settings: LoadSettings


@dataclass(frozen=True)
class NetworkSpec:
    """A network of a worker: its bundle, which must have the fingerprint, its engines and settings."""

    bundle: Bundle
    fingerprint: str
    engines: Engines
    predict: PredictSettings


@dataclass(frozen=True)
class LargeNetwork(NetworkSpec):
    """The large network of a cascade, which predicts the rows below the threshold of their class.

    `thresholds` are confidences of the small network for each of its classes after the label map.
    """

    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class WorkerSpec:
    """What every worker of a run receives; the object store of each node holds one copy.

    Attributes:
        bundle, fingerprint, engines, predict: of the network, or of the small network of a cascade; see `NetworkSpec`.
        load: settings of the loader.
        writer: writer of the parts.
        resources: resource plan of the run.
        large: the large network of a cascade; None without one.
    """

    bundle: Bundle
    fingerprint: str
    engines: Engines
    load: LoadSpec
    predict: PredictSettings
    writer: PartWriter
    resources: ResourcePlan
    large: LargeNetwork | None = None

    @property
    def network(self) -> NetworkSpec:
        """The network, or the small network of a cascade."""
        return NetworkSpec(self.bundle, self.fingerprint, self.engines, self.predict)


@dataclass(frozen=True)
class PipelineSpec:
    """What a pipeline processes, and how.

    Attributes:
        manifest: the catalog.
        rows: rows of the manifest to process.
        invalid_ids: rows of the manifest whose item ids are missing or duplicated.
        worker: specification of the workers.
        placement: nodes on which the workers run.
        no_progress_timeout_seconds: the pipeline fails when no row is finished for this long.
    """

    manifest: Manifest
    rows: RowRanges
    invalid_ids: "InvalidIds"
    worker: WorkerSpec
    placement: Placement
    no_progress_timeout_seconds: float
