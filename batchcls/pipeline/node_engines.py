"""Selection of the engine for each kind of node: given by the settings, recorded by an earlier run, or measured."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchcls.cluster.placement import choose_placement
from batchcls.config.pipeline_config import PipelineSettings
from batchcls.hardware import Hardware
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, decode_limits, fetch_policy
from batchcls.inference.engine_record import EngineRequest, EngineSelectionRecord
from batchcls.manifest.sample import RowSample, take_sample
from batchcls.manifest.snapshot import Manifest
from batchcls.models.classifier_head import layers_of
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, Device, EngineChoice, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine
from batchcls.preprocessing import Preprocessing
from batchcls.ray_runtime import NodeInfo, alive_nodes, hardware_of, run_exclusive
from batchcls.resources import ResourcePlan
from batchcls.runs import engine_cache
from batchcls.runs.plan import RecordedEngines
from batchcls.storage.filesystem import Storage

if TYPE_CHECKING:  # it imports PyTorch
    from batchcls.comparison.sample_pixels import SamplePixels

_INT8 = EngineChoice("openvino", "int8")  # no other engine has int8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSelection:
    """The engine of every kind of node, and the measurements from which they were selected.

    Attributes:
        engines: for the workers.
        decode_margin: of `LoadSettings`; one for all kinds of nodes, so that an image gets the same prediction
            wherever it is decoded.
        records: the selection of each kind of node whose engine was measured.
        new_records: those of `records` that the output folder does not contain yet; of both networks of a cascade.
        large: the selection for the large network of a cascade; None without one.
    """

    engines: Engines
    decode_margin: float | None
    records: tuple[EngineSelectionRecord, ...]
    new_records: tuple[EngineSelectionRecord, ...] = ()
    large: "EngineSelection | None" = None

    @property
    def all_records(self) -> tuple[EngineSelectionRecord, ...]:
        """The selections of all networks."""
        return self.records if self.large is None else (*self.records, *self.large.records)

    @property
    def precisions(self) -> set[str]:
        """Precisions of the network on all kinds of nodes."""
        node_engines = [*self.engines.by_hardware.values()] or [self.engines.default]
        return {node_engine.choice.precision for node_engine in node_engines}

    def recorded(self) -> RecordedEngines:
        """Return the part of plan.json from which a resumed run restores the selection."""
        large = () if self.large is None else self.large.records
        return RecordedEngines(selections=self.records, large=large, decode_margin=self.decode_margin)


@dataclass(frozen=True)
class SampleImages:
    """Images of the catalog in a network's preprocessing, decoded when and where they are needed.

    `manifest` is the fingerprint of the manifest from which the sample was drawn.
    """

    manifest: str
    sample: RowSample
    preprocessing: Preprocessing
    fetch: FetchPolicy
    limits: DecodeLimits

    def load(self, decode_margin: float | None = None) -> "SamplePixels":
        """Fetch and decode the sample without the images that fail. Raises InputError if all of them fail."""
        from batchcls.comparison.sample_pixels import load_sample_pixels  # noqa: PLC0415 - imports PyTorch

        return load_sample_pixels(self.sample, self.preprocessing, self.fetch, self.limits, decode_margin)

    def calibration(self) -> NDArray[np.uint8]:
        """Return the half of the sample that calibrates int8; its accuracy is measured on the other half."""
        return self.load().pixels[::2]


def select_all_engines(
    config: PipelineSettings,
    manifest: Manifest,
    bundles: Sequence[Bundle],
    resources: ResourcePlan,
    storage: Storage,
    restored: RecordedEngines | None = None,
) -> EngineSelection:
    """Select the engines of a network, or those of the small and the large network of a cascade.

    Both networks of a cascade take images of one decode, at the larger of the scales that they need.

    Args and exceptions are those of `select_engines`; `bundles` are one or two models.
    """
    of_large = None if restored is None else restored.model_copy(update={"selections": restored.large})
    recorded = [restored, of_large]
    selection, *others = [
        select_engines(config, manifest, bundle, resources, storage, engines)
        for bundle, engines in zip(bundles, recorded, strict=False)
    ]
    for large in others:
        margins = [found.decode_margin for found in (selection, large) if found.decode_margin is not None]
        selection = replace(
            selection,
            decode_margin=max(margins) if len(margins) == len(bundles) else None,
            new_records=(*selection.new_records, *large.new_records),
            large=large,
        )
    return selection


def select_engines(
    config: PipelineSettings,
    manifest: Manifest,
    bundle: Bundle,
    resources: ResourcePlan,
    storage: Storage,
    restored: RecordedEngines | None = None,
) -> EngineSelection:
    """Resolve `--engine auto --precision auto` for every kind of node that the run may use.

    Args:
        config: settings of the job.
        manifest: the catalog.
        bundle: the model.
        resources: resource plan of the run.
        storage: access to both and to the output.
        restored: the selection with which a resumed run started; None for a new run. All rows of a run are predicted
            by the same engine on the same kind of node.

    Raises:
        InputError: the requested engine or precision is not available, or exceeds its accuracy tolerance.
        GoldenMismatch: the network does not reproduce the golden outputs of its bundle.
    """
    batch_size = None if config.batch_size == "auto" else config.batch_size
    request = EngineRequest.from_settings(config, batch_size, scaled_decode=config.scaled_decode == "auto")
    default = NodeEngine(default_choice(request), resources.batch_size)
    probe_batches = resources.device == "cuda" and config.batch_size == "auto"
    if "auto" not in (request.engine, request.precision) and request.precision != "int8":
        engines = Engines({}, default, config.cache_dir, None, probe_batches)
        return EngineSelection(engines, _decode_margin(config, ()), ())
    images, layers = _sample_images(config, manifest, bundle, storage), layers_of(bundle)
    selected: dict[str, EngineSelectionRecord] = {}
    new_records: list[EngineSelectionRecord] = []
    restored_records = (
        None if restored is None else {record.hardware_key: record for record in restored.selections}
    )
    for hardware, node in _kinds_of_nodes(config, resources.device):
        record = None if restored_records is None else restored_records.get(hardware.key)
        # A run that started without measurements is resumed without them.
        is_undecided = restored_records is None or (restored_records and record is None)
        if is_undecided and not config.retune:
            record = engine_cache.load(config.output, layers, hardware, request, storage)
        if (
            is_undecided
            and record is None
            and (manifest.rows >= config.autotune_min_rows or request.precision == "int8")
        ):
            record = _measure(config, node, bundle, images, request, resources)
            record = record.model_copy(update={"layers": layers})
            new_records.append(record)
        if record is None:
            _logger.info("engine: %s, not measured for %d rows", default.choice, manifest.rows)
        else:
            selected[hardware.key] = record
            _log_selection(node, record)
    by_hardware = {key: NodeEngine(record.choice, record.batch_size) for key, record in selected.items()}
    is_int8 = any(record.precision == "int8" for record in selected.values())
    engines = Engines(
        by_hardware, default, config.cache_dir, images.calibration if is_int8 else None, probe_batches
    )
    records = tuple(selected.values())
    margin = _decode_margin(config, records) if restored is None else restored.decode_margin
    return EngineSelection(engines, margin, records, tuple(new_records))


def _decode_margin(config: PipelineSettings, records: Sequence[EngineSelectionRecord]) -> float | None:
    """Return the largest margin of all kinds of nodes, which is accurate on each; None if one decodes at full scale."""
    if isinstance(config.scaled_decode, float):
        return config.scaled_decode
    margins = [None if record.scaled_decode is None else record.scaled_decode.margin for record in records]
    required = [margin for margin in margins if margin is not None]
    return max(required) if required and len(required) == len(margins) else None


def default_choice(request: EngineRequest) -> EngineChoice:
    """Return the requested engine, with the reference instead of `auto`, which is accurate on every node but slow."""
    reference = _INT8 if request.precision == "int8" else REFERENCE
    return EngineChoice(
        reference.engine if request.engine == "auto" else request.engine,
        reference.precision if request.precision == "auto" else request.precision,
    )


def _sample_images(
    config: PipelineSettings, manifest: Manifest, bundle: Bundle, storage: Storage
) -> SampleImages:
    sample = take_sample(manifest.without_kept(), config.calibration_images, storage)
    return SampleImages(
        manifest.fingerprint, sample, bundle.config.preprocessing, fetch_policy(config), decode_limits(config)
    )


def _kinds_of_nodes(config: PipelineSettings, device: Device) -> Sequence[tuple[Hardware, NodeInfo]]:
    """Return the kinds of nodes on which the network may run, each with its first node."""
    nodes = choose_placement(config, alive_nodes()).network_nodes(device)
    first: dict[str, tuple[Hardware, NodeInfo]] = {}
    for node, hardware in zip(nodes, hardware_of(nodes), strict=True):
        first.setdefault(hardware.key, (hardware, node))
    return list(first.values())


def _measure(
    config: PipelineSettings,
    node: NodeInfo,
    bundle: Bundle,
    images: SampleImages,
    request: EngineRequest,
    resources: ResourcePlan,
) -> EngineSelectionRecord:
    _logger.info(
        "measuring engines on %s with up to %d images for %g s, plus compilation; later runs reuse the selection",
        node.host,
        config.calibration_images,
        config.calibration_seconds,
    )
    engine_config = EngineConfig(
        resources.device,
        resources.threads_per_actor,
        resources.batch_size,
        CompileCache.from_cache_dir(config.cache_dir),
    )
    return run_exclusive(
        node, _select_on_this_node, bundle, images, request, engine_config, config.calibration_seconds
    )


def _select_on_this_node(
    bundle: Bundle, images: SampleImages, request: EngineRequest, config: EngineConfig, seconds: float
) -> EngineSelectionRecord:
    from batchcls.inference.engine_selection import CalibrationImages, select_engine  # noqa: PLC0415 - imports PyTorch
    from batchcls.inference.scaled_decode import (  # noqa: PLC0415 - imports PyTorch
        DecodedSample,
        measure_scaled_decode,
    )

    full = images.load()
    record = select_engine(bundle, CalibrationImages(full.pixels, images.manifest), request, config, seconds)
    if not request.scaled_decode:
        return record
    scale = measure_scaled_decode(
        bundle,
        record,
        replace(config, batch_size=record.batch_size, calibration=images.calibration),
        DecodedSample(full.pixels, full.sizes, lambda margin: images.load(margin).pixels),
    )
    return record.model_copy(update={"scaled_decode": scale})


def _log_selection(node: NodeInfo, record: EngineSelectionRecord) -> None:
    for candidate in record.candidates:
        if candidate.rejected is not None:
            _logger.info("engine: %s: rejected, %s", candidate, candidate.rejected)
    for note in record.notes:
        _logger.info("engine: %s", note)
    _logger.info(
        "engine on %s: %s, batches of %d, measured %s at %.1f images/s",
        node.host,
        record.choice,
        record.batch_size,
        record.created.date(),
        record.images_per_second,
    )
    if record.scaled_decode is not None:
        _logger.info("decoding on %s: %s", node.host, record.scaled_decode)
