"""Which engine runs the network on which kind of node: asked for, chosen on an earlier night, or measured now."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from batchcls.config.pipeline_config import PipelineSettings
from batchcls.errors import InputError
from batchcls.hardware import Hardware
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, decode_limits, fetch_policy
from batchcls.inference.engine_record import EngineRequest, EngineSelectionRecord
from batchcls.manifest.sample import RowSample as ImageSample
from batchcls.manifest.sample import take_sample
from batchcls.manifest.snapshot import Manifest
from batchcls.models.engines.compile_cache import Conversions
from batchcls.models.engines.engine import REFERENCE, Device, EngineChoice, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.pipeline.pipeline_spec import Engines, NodeEngine
from batchcls.preprocessing import Preprocessing
from batchcls.ray_runtime import NodeInfo, hardware_of, living_nodes, run_alone
from batchcls.resources import ResourcePlan
from batchcls.runs import engine_cache
from batchcls.storage.filesystem import Storage

if TYPE_CHECKING:  # it needs torch
    from batchcls.comparison.sample_pixels import Prepared

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSelection:
    """What runs the network and how far JPEGs may be reduced for it; `measured` says how that was found.

    `decode_margin` is that of `LoadSettings`: one for all kinds of nodes, so that an image gets the
    same answer wherever it is loaded. `new` are those of `measured` that are not kept in the output
    folder yet.
    """

    engines: Engines
    decode_margin: float | None
    measured: tuple[EngineSelectionRecord, ...]
    new: tuple[EngineSelectionRecord, ...] = ()

    @property
    def precisions(self) -> set[str]:
        """Of the network, on all kinds of nodes."""
        chosen = [*self.engines.by_hardware.values()] or [self.engines.otherwise]
        return {node.choice.precision for node in chosen}

    def as_json(self) -> dict[str, Any]:
        """For plan.json, from which a run that goes on takes it again."""
        measured = [known.model_dump(mode="json") for known in self.measured]
        return {"measured": measured, "decode_margin": self.decode_margin}


@dataclass(frozen=True)
class SampleImages:
    """Images of the catalog in a network's preprocessing, loaded where and when they are needed.

    `manifest` is the fingerprint of the manifest that the sample is from.
    """

    manifest: str
    sample: ImageSample
    preprocessing: Preprocessing
    fetch: FetchPolicy
    limits: DecodeLimits

    def load(self, decode_margin: float | None = None) -> "Prepared":
        """Images that fail are left out. Raises InputError if all of them do."""
        # Decoding needs torch, which the driver can do without.
        prepare = importlib.import_module("batchcls.comparison.sample_pixels").prepare
        prepared: Prepared = prepare(self.sample, self.preprocessing, self.fetch, self.limits, decode_margin)
        return prepared

    def calibration(self) -> NDArray[np.uint8]:
        """The half that int8 takes its scales from; what it answers to the other half is measured."""
        return self.load().pixels[::2]


def settle_engines(
    config: PipelineSettings,
    manifest: Manifest,
    bundle: Bundle,
    placement: ResourcePlan,
    storage: Storage,
    begun: Mapping[str, Any] | None = None,
) -> EngineSelection:
    """Settle what `--engine auto --precision auto` means on every kind of node that the run may use.

    Args:
        config: settings of the job.
        manifest: what is classified.
        bundle: with what.
        placement: shape of the run.
        storage: how to reach both and the output.
        begun: what was settled when the run began, `EngineSelection.as_json`, where it goes on now; all rows
            of a run are answered by the same engine on the same kind of node.

    Raises:
        InputError: what was asked for cannot be had, or misses its bound.
        GoldenMismatch: the network does not answer as its bundle says.
    """
    batch_size = None if config.batch_size == "auto" else config.batch_size
    wanted = EngineRequest.of(config, batch_size, reduced_scale=config.scaled_decode == "auto")
    plain = _without_measuring(wanted)
    otherwise = NodeEngine(plain, placement.batch_size)
    probe = placement.device == "cuda" and config.batch_size == "auto"
    if "auto" not in (wanted.engine, wanted.precision) and wanted.precision != "int8":
        return EngineSelection(Engines({}, otherwise, config.cache_dir, None, probe), _margin(config, ()), ())
    images = _images(config, manifest, bundle, storage)
    found: dict[str, EngineSelectionRecord] = {}
    new: list[EngineSelectionRecord] = []
    kept = None if begun is None else _measured_before(begun)
    for hardware, node in _kinds(placement.device):
        known = None if kept is None else kept.get(hardware.key)
        is_open = kept is None or (kept and known is None)  # a run that began unmeasured stays so
        if is_open and not config.retune:
            known = engine_cache.load(config.output, bundle.fingerprint, hardware, wanted, storage)
        if (
            is_open
            and known is None
            and (manifest.rows >= config.autotune_min_rows or wanted.precision == "int8")
        ):
            known = _measure(config, node, bundle, images, wanted, placement)
            new.append(known)
        if known is None:
            _logger.info("engine: %s, not measured for %d rows", plain, manifest.rows)
        else:
            found[hardware.key] = known
            _tell(node, known)
    by_hardware = {key: NodeEngine(known.choice, known.batch_size) for key, known in found.items()}
    calibration = images.calibration if any(m.precision == "int8" for m in found.values()) else None
    engines = Engines(by_hardware, otherwise, config.cache_dir, calibration, probe)
    measured = tuple(found.values())
    margin = _margin(config, measured) if begun is None else begun["decode_margin"]
    return EngineSelection(engines, margin, measured, tuple(new))


def _measured_before(begun: Mapping[str, Any]) -> dict[str, EngineSelectionRecord]:
    """What a run that goes on was measured with when it began, by `Hardware.key`."""
    try:
        found = [EngineSelectionRecord.model_validate(record) for record in begun["measured"]]
    except (KeyError, ValidationError) as error:
        raise InputError(
            f"plan.json was written by another version ({type(error).__name__}); begin a new run with another --run-id"
        ) from None
    return {known.hardware_key: known for known in found}


def _margin(config: PipelineSettings, measured: Sequence[EngineSelectionRecord]) -> float | None:
    """The largest that a kind of node needs: what keeps the answers of all of them."""
    if isinstance(config.scaled_decode, float):
        return config.scaled_decode
    margins = [None if known.reduced_scale is None else known.reduced_scale.margin for known in measured]
    needed = [margin for margin in margins if margin is not None]
    return max(needed) if needed and len(needed) == len(margins) else None


def _without_measuring(wanted: EngineRequest) -> EngineChoice:
    """What is asked for, and the reference in place of what is not: right everywhere, if slow."""
    return EngineChoice(
        REFERENCE.engine if wanted.engine == "auto" else wanted.engine,
        REFERENCE.precision if wanted.precision == "auto" else wanted.precision,
    )


def _images(config: PipelineSettings, manifest: Manifest, bundle: Bundle, storage: Storage) -> SampleImages:
    sample = take_sample(manifest.without_kept(), config.calibration_images, storage)
    return SampleImages(
        manifest.fingerprint, sample, bundle.config.preprocessing, fetch_policy(config), decode_limits(config)
    )


def _kinds(device: Device) -> Sequence[tuple[Hardware, NodeInfo]]:
    """The kinds of nodes that may run the network, each with its first node."""
    nodes = [node for node in living_nodes() if device == "cpu" or node.gpus > 0]
    first: dict[str, tuple[Hardware, NodeInfo]] = {}
    for node, hardware in zip(nodes, hardware_of(nodes), strict=True):
        first.setdefault(hardware.key, (hardware, node))
    return list(first.values())


def _measure(
    config: PipelineSettings,
    node: NodeInfo,
    bundle: Bundle,
    images: SampleImages,
    wanted: EngineRequest,
    placement: ResourcePlan,
) -> EngineSelectionRecord:
    _logger.info(
        "measuring engines on %s with up to %d images, %g s and the conversions; the choice is kept for later runs",
        node.host,
        config.calibration_images,
        config.calibration_seconds,
    )
    place = EngineConfig(
        placement.device, placement.threads_per_actor, placement.batch_size, Conversions.at(config.cache_dir)
    )
    return run_alone(node, _choose_here, bundle, images, wanted, place, config.calibration_seconds)


def _choose_here(
    bundle: Bundle,
    images: SampleImages,
    wanted: EngineRequest,
    place: EngineConfig,
    seconds: float,
) -> EngineSelectionRecord:
    choosing = importlib.import_module("batchcls.inference.engine_selection")
    whole = images.load()
    measured: EngineSelectionRecord = choosing.choose(
        bundle, choosing.Sample(whole.pixels, images.manifest), wanted, place, seconds
    )
    if not wanted.reduced_scale:
        return measured
    scale = importlib.import_module("batchcls.inference.scaled_decode")
    found = scale.measure_reduced_scale(
        bundle,
        measured,
        replace(place, batch_size=measured.batch_size, calibration=images.calibration),
        scale.CalibrationPixels(whole.pixels, whole.sizes, lambda margin: images.load(margin).pixels),
    )
    return measured.model_copy(update={"reduced_scale": found})


def _tell(node: NodeInfo, known: EngineSelectionRecord) -> None:
    for entry in known.candidates:
        if entry.rejected is not None:
            _logger.info("engine: %s: not taken, %s", entry, entry.rejected)
    for note in known.notes:
        _logger.info("engine: %s", note)
    _logger.info(
        "engine on %s: %s, batches of %d, measured %s at %.1f images/s",
        node.host,
        known.choice,
        known.batch_size,
        known.created.date(),
        known.images_per_second,
    )
    if known.reduced_scale is not None:
        _logger.info("decoding on %s: %s", node.host, known.reduced_scale)
