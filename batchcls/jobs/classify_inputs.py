"""What the main job was asked for, opened and checked."""

import logging
from dataclasses import dataclass

from batchcls.config.classify import ClassifyConfig
from batchcls.errors import InputError
from batchcls.identity import BadIds, find_bad_ids
from batchcls.inference.abstention import Abstention
from batchcls.manifest import Manifest, open_manifest
from batchcls.models.bundle import Bundle, BundleConfig
from batchcls.models.choices import ModelChoices
from batchcls.models.engines.start import missing
from batchcls.models.resolve import check_model, parse_model_arguments, resolve_model
from batchcls.runs.layout import run_folder
from batchcls.storage import Storage, explain, is_remote, redact_uri
from batchcls.tables import bundle_line
from batchcls.views import Views, views_of

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Manifest, model and views of a run, and how storage is reached."""

    manifest: Manifest
    bad_ids: BadIds
    bundle: Bundle
    views: Views
    storage: Storage

    @property
    def has_remote_images(self) -> bool:
        """Whether images are fetched over a network."""
        return self.manifest.columns.uri is not None and is_remote(self.manifest.base)


def check_inputs(config: ClassifyConfig) -> Manifest:
    """Refuse within seconds, without Ray and without torch, what cannot work; returns the opened manifest.

    Raises:
        InputError: something is not there, does not fit, or cannot be reached.
    """
    storage = Storage(config.storage_options)
    engine = "openvino" if config.precision == "int8" else config.engine
    if engine != "auto" and (lacking := missing(engine)) is not None:
        raise InputError(f"--engine {config.engine} --precision {config.precision}: {lacking}")
    bundle = check_model(config.model, _model_choices(config), storage)
    if bundle is not None:
        if config.abstain:
            Abstention.of(bundle)
        _require_views(config, bundle)
    elif config.abstain:
        raise InputError(
            "--abstain: an architecture has no thresholds; use a bundle that `evaluate` has calibrated"
        )
    with explain(config.output):
        # Keys, bucket and network of the output are tried before anything costs time.
        storage.list_files(run_folder(config.output, config.run_id or "none"))
    manifest = open_manifest(
        config.manifest, storage, id_column=config.id_column, keep=config.keep, limit=config.limit
    )
    _logger.info("manifest: %d rows in %d file(s)", manifest.rows, len(manifest.files))
    return manifest


def open_inputs(config: ClassifyConfig, manifest: Manifest) -> Inputs:
    """Open everything that a run reads, after `check_inputs`.

    Raises:
        InputError: something does not fit, or cannot be reached.
    """
    storage = Storage(config.storage_options)
    bad_ids = find_bad_ids(manifest, storage)
    if len(bad_ids.null) or len(bad_ids.repeated):
        _logger.warning("manifest: %d null and %d repeated ids", len(bad_ids.null), len(bad_ids.repeated))
    bundle = resolve_model(config.model, _model_choices(config), storage)
    if bundle.config.golden is None:
        # Only a bundle that was just made from a name lacks them, and torch is imported for it anyway.
        from batchcls.inference.reference import with_golden  # noqa: PLC0415

        bundle = with_golden(bundle)
    _logger.info("model: %s", bundle_line(bundle))
    _require_fingerprint(config, bundle)
    _logger.info("embedding: %s", _embedding_line(config, bundle))
    return Inputs(manifest, bad_ids, bundle, views_of(config.tta, bundle.config.preprocessing), storage)


def _model_choices(config: ClassifyConfig) -> ModelChoices:
    return ModelChoices(
        weights=config.weights,
        labels=config.labels,
        arguments=parse_model_arguments(config.model_args or ""),
        tap=config.embedding_tap,
        allow_random=config.allow_random_weights,
    )


def _require_fingerprint(config: ClassifyConfig, bundle: Bundle) -> None:
    wanted = config.model_fingerprint
    if wanted is not None and not bundle.fingerprint.startswith(wanted):
        raise InputError(
            f"--model-fingerprint {wanted}: {redact_uri(config.model)} has {bundle.fingerprint}; it is another "
            "model than the one this job is pinned to"
        )


def _require_views(config: ClassifyConfig, bundle: BundleConfig) -> None:
    """Probabilities that are averaged over other views are not what temperature and thresholds were fitted on."""
    calibration = bundle.calibration
    if calibration is None or calibration.tta == config.tta:
        return
    told = (
        f"--tta {config.tta}: {redact_uri(config.model)} was calibrated with --tta {calibration.tta}; classify with "
        f"that, or calibrate it again with `python -m batchcls.jobs.evaluate --tta {config.tta} --write-bundle BUNDLE`"
    )
    if config.abstain:
        raise InputError(f"{told}; its thresholds do not hold for other views")
    _logger.warning("%s; probabilities may be less well calibrated", told)


def _embedding_line(config: ClassifyConfig, bundle: Bundle) -> str:
    """What the embedding column will hold."""
    if config.embedding_dtype == "none":
        return "not written"
    length = ", of length 1" if config.l2_normalize else ""
    views = f", mean of the views of {config.tta}" if config.tta != "none" else ""
    made = f"{bundle.config.embedding_dimension} x {config.embedding_dtype}"
    return f"{bundle.config.embedding_tap}, {made}{views}{length}"
