"""Plan a run of the classify job: check and open its inputs, and derive the plan and the pipeline from them."""

import logging
from dataclasses import dataclass

from batchcls.cli.tables import bundle_line
from batchcls.cluster.job_nodes import JobNodes
from batchcls.cluster.placement import Placement
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.inference.abstention import Abstention
from batchcls.inference.predictor_config import PredictSettings
from batchcls.manifest.ids import InvalidIds, find_invalid_ids
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.models.classifier_head import ClassifierHead, ModelLayers, layers_of
from batchcls.models.engines.factory import missing_package
from batchcls.models.label_map import LabelMap, read_label_map
from batchcls.models.mapped_classes import MappedClasses
from batchcls.models.model_bundle import Bundle, BundleConfig
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import check_model, parse_model_arguments, resolve_model
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import LoadSpec, PipelineSpec, WorkerSpec
from batchcls.preprocessing import Views, views_of
from batchcls.ray_runtime import wait_for_cluster
from batchcls.resources import ResourcePlan, plan_resources
from batchcls.runs.parts import PartWriter
from batchcls.runs.paths import run_folder
from batchcls.runs.plan import Fingerprints, Plan, prediction_settings
from batchcls.runs.records import ManifestInfo, ModelInfo
from batchcls.runs.split_labels import can_be_compared
from batchcls.schema import EMBEDDING_TYPES, ITEM_ID, URI
from batchcls.storage.filesystem import Storage, explain, is_remote, redact_uri
from batchcls.storage.uris import canonical_location

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClassifyInputs:
    """The opened manifest and model of a run, with its parts and views, and access to storage."""

    manifest: Manifest
    invalid_ids: InvalidIds
    bundle: Bundle
    mapped: MappedClasses
    layers: ModelLayers
    head: ClassifierHead | None
    views: Views
    storage: Storage

    @property
    def has_remote_images(self) -> bool:
        """Whether images are fetched over a network."""
        return self.manifest.columns.uri is not None and is_remote(self.manifest.base)


def check_inputs(config: ClassifyConfig) -> Manifest:
    """Check the inputs within seconds, without Ray and PyTorch, and return the opened manifest.

    Raises:
        InputError: an input is missing, cannot be read, or does not match the settings.
    """
    storage = Storage(config.storage_options)
    engine = "openvino" if config.precision == "int8" else config.engine
    if engine != "auto" and (lacking := missing_package(engine)) is not None:
        raise InputError(f"--engine {config.engine} --precision {config.precision}: {lacking}")
    bundle = check_model(config.model, _model_choices(config), storage)
    label_map = read_map(config, storage)
    if bundle is not None:
        mapped = MappedClasses.of(bundle, label_map)
        if config.abstain:
            Abstention.from_bundle(mapped.config)
        _require_views(config, bundle)
    elif config.abstain:
        raise InputError(
            "--abstain: an architecture has no thresholds; use a bundle that `evaluate` has calibrated"
        )
    with explain(config.output):
        # Credentials, bucket and network of the output are checked before any work starts.
        storage.list_files(run_folder(config.output, config.run_id or "none"))
    manifest = open_manifest(
        config.manifest, storage, id_column=config.id_column, keep=config.keep, limit=config.limit
    )
    _logger.info("manifest: %d rows in %d file(s)", manifest.rows, len(manifest.files))
    _require_split_columns(label_map, manifest)
    return manifest


def open_inputs(config: ClassifyConfig, manifest: Manifest, bundle: Bundle | None = None) -> ClassifyInputs:
    """Open everything that a run reads, after `check_inputs`; `bundle` if `open_bundle` has opened it already.

    Raises:
        InputError: an input cannot be read or does not match the settings.
    """
    storage = Storage(config.storage_options)
    invalid_ids = find_invalid_ids(manifest, storage)
    if len(invalid_ids.null) or len(invalid_ids.duplicate):
        _logger.warning(
            "manifest: %d null and %d repeated ids", len(invalid_ids.null), len(invalid_ids.duplicate)
        )
    bundle = bundle or open_bundle(config, storage)
    _logger.info("embedding: %s", _embedding_line(config, bundle))
    mapped = MappedClasses.of(bundle.config, read_map(config, storage))
    if mapped.label_map is not None:
        _logger.info(
            "label map: %d labels of the bundle become %d, before splits",
            len(bundle.config.labels),
            len(mapped.config.labels),
        )
    return ClassifyInputs(
        manifest=manifest,
        invalid_ids=invalid_ids,
        bundle=bundle,
        mapped=mapped,
        layers=layers_of(bundle, mapped),
        head=ClassifierHead.of(bundle),
        views=views_of(config.tta, bundle.config.preprocessing),
        storage=storage,
    )


def open_bundle(config: ClassifyConfig, storage: Storage) -> Bundle:
    """Open the model of a run, after `check_inputs`.

    Raises:
        InputError: the model cannot be read or does not match the settings.
    """
    bundle = resolve_model(config.model, _model_choices(config), storage)
    if bundle.config.golden is None:
        # Only a bundle that was just created from a name lacks them, and torch is imported for that anyway.
        from batchcls.inference.golden_record import with_golden  # noqa: PLC0415

        bundle = with_golden(bundle)
    _logger.info("model: %s", bundle_line(bundle))
    _require_fingerprint(config, bundle)
    return bundle


def read_map(config: ClassifyConfig, storage: Storage) -> LabelMap | None:
    """The map of `--label-map`. Raises InputError if it cannot be read or contradicts itself."""
    return None if config.label_map is None else read_label_map(config.label_map, storage)


def _require_split_columns(label_map: LabelMap | None, manifest: Manifest) -> None:
    """Raise InputError if a rule reads a column that the rows of the run do not have."""
    types = {field.name: field.type for field in manifest.columns.kept}
    for column in sorted((label_map.columns if label_map else frozenset()) - {ITEM_ID, URI}):
        if column not in types:
            raise InputError(f"--label-map: a rule reads the column {column}; add it with --keep {column}")
        if not can_be_compared(types[column]):
            raise InputError(
                f"--label-map: a rule reads the column {column} of type {types[column]}; rules read text, integers and "
                "booleans"
            )


def plan_on_cluster(config: ClassifyConfig, inputs: ClassifyInputs) -> tuple[ResourcePlan, Placement]:
    """Wait until the cluster has the nodes that the run needs, and plan its resources and where they are.

    Raises:
        InputError: the cluster does not have them within the time limit.
    """
    job_nodes = JobNodes(config)

    def attempt() -> tuple[ResourcePlan, Placement]:
        placement = job_nodes.find()
        plan = plan_resources(
            config, placement.nodes, inputs.manifest.rows, remote_images=inputs.has_remote_images
        )
        return plan, placement

    plan, placement = wait_for_cluster(attempt, config.wait_for_cluster_seconds, lambda: job_nodes.find().job)
    for reason in plan.reasons:
        _logger.info(reason)
    _logger.info(placement.describe(plan.device, is_staged=plan.shape == "staged"))
    if config.device == "auto" and plan.device == "cpu" and config.gpus_per_actor != 0:
        job_nodes.warn_about_missing_gpus(placement)
    return plan, placement


def _model_choices(config: ClassifyConfig) -> ModelChoices:
    return ModelChoices(
        weights=config.weights,
        labels=config.labels,
        arguments=parse_model_arguments(config.model_args or ""),
        tap=config.embedding_tap,
        allow_random=config.allow_random_weights,
    )


def _require_fingerprint(config: ClassifyConfig, bundle: Bundle) -> None:
    expected = config.model_fingerprint
    if expected is not None and not bundle.fingerprint.startswith(expected):
        raise InputError(
            f"--model-fingerprint {expected}: {redact_uri(config.model)} has the fingerprint {bundle.fingerprint}, "
            "so it is not the model that this job is pinned to"
        )


def _require_views(config: ClassifyConfig, bundle: BundleConfig) -> None:
    """Temperature and thresholds are fitted to averages over certain views and do not hold for others."""
    calibration = bundle.calibration
    if calibration is None or calibration.tta == config.tta:
        return
    message = (
        f"--tta {config.tta}: {redact_uri(config.model)} was calibrated with --tta {calibration.tta}; classify with "
        f"that, or calibrate it again with `batchcls evaluate --tta {config.tta} --write-bundle BUNDLE`"
    )
    if config.abstain:
        raise InputError(f"{message}; its thresholds do not hold for other views")
    _logger.warning("%s; probabilities may be less well calibrated", message)


def _embedding_line(config: ClassifyConfig, bundle: Bundle) -> str:
    """Describe the contents of the embedding column for the log."""
    if config.embedding_dtype == "none":
        return "not written"
    length = ", of length 1" if config.l2_normalize else ""
    views = f", mean of the views of {config.tta}" if config.tta != "none" else ""
    made = f"{bundle.config.embedding_dimension} x {config.embedding_dtype}"
    return f"{bundle.config.embedding_tap}, {made}{views}{length}"


def fingerprints_of(config: ClassifyConfig, inputs: ClassifyInputs) -> Fingerprints:
    """The fingerprints that identify the run: those of its manifest, its model and its settings."""
    return Fingerprints.of(
        config, inputs.manifest.fingerprint, inputs.bundle.fingerprint, inputs.mapped.label_map
    )


def plan_of(
    config: ClassifyConfig,
    inputs: ClassifyInputs,
    resource_plan: ResourcePlan,
    selection: EngineSelection,
    run_id: str,
) -> Plan:
    """The plan of a run."""
    manifest, bundle = inputs.manifest, inputs.bundle
    fingerprints = fingerprints_of(config, inputs)
    unpublishable = []
    if not bundle.publishable:
        unpublishable.append("the weights are random, or the head was never trained")
    if config.limit is not None:
        unpublishable.append(f"--limit {config.limit}: only a part of the manifest")
    return Plan(
        run_id=run_id,
        config=config.redacted(),
        manifest=ManifestInfo(
            uri=redact_uri(config.manifest),
            base=canonical_location(manifest.base),
            fingerprint=manifest.fingerprint,
            rows=manifest.rows,
            files=len(manifest.files),
        ),
        model=ModelInfo(
            fingerprint=bundle.fingerprint,
            layers=inputs.layers,
            source=bundle.config.source,
            architecture=bundle.config.architecture,
            classes=len(inputs.mapped.config.labels),
            label_map=inputs.mapped.label_map,
            groups=inputs.mapped.groups,
            preprocessing=bundle.config.preprocessing,
            embedding_tap=bundle.config.embedding_tap,
            weights=bundle.config.weights,
        ),
        resources=resource_plan,
        unpublishable=tuple(unpublishable),
        fingerprints=fingerprints,
        engines=selection.recorded(),
        result_settings=prediction_settings(config, selection.precisions, selection.decode_margin),
    )


def pipeline_spec_of(
    config: ClassifyConfig,
    inputs: ClassifyInputs,
    resource_plan: ResourcePlan,
    placement: Placement,
    selection: EngineSelection,
    run_id: str,
) -> PipelineSpec:
    """The specification of the pipeline over all rows of the manifest."""
    kept = inputs.manifest.columns.kept
    bundle, mapped = inputs.bundle.config, inputs.mapped
    embedding = EMBEDDING_TYPES[config.embedding_dtype]
    load = LoadSettings(
        run_id=run_id,
        base=inputs.manifest.base,
        kept=kept,
        fetch=fetch_policy(config),
        limits=decode_limits(config),
        preprocessing=bundle.preprocessing,
        views=inputs.views,
        normalize=config.normalize,
        fetch_threads=resource_plan.fetch_threads,
        decode_threads=resource_plan.decode_threads,
        block_rows=resource_plan.block_rows,
        decode_margin=selection.decode_margin,
        share_predictions=config.share_predictions,
    )
    predict = PredictSettings(
        labels=tuple(mapped.config.labels),
        top_k=config.top_k,
        embedding=embedding,
        embedding_dimension=bundle.embedding_dimension,
        l2_normalize=config.l2_normalize,
        views=inputs.views,
        input_shape=bundle.preprocessing.shape,
        normalize=config.normalize,
        batch_size=resource_plan.batch_size,
        kept=kept,
        temperature=bundle.calibration.temperature if bundle.calibration else 1.0,
        abstention=Abstention.from_bundle(mapped.config) if config.abstain else None,
        groups=mapped.groups,
    )
    worker = WorkerSpec(
        bundle=inputs.bundle,
        fingerprint=inputs.bundle.fingerprint,
        engines=selection.engines,
        load=LoadSpec(inputs.manifest.columns, inputs.storage, load),
        predict=predict,
        writer=PartWriter(
            run_folder(config.output, run_id),
            inputs.storage,
            kept,
            embedding,
            bundle.embedding_dimension,
            abstain=config.abstain,
            label_map=mapped.label_map,
        ),
        resources=resource_plan,
    )
    return PipelineSpec(
        manifest=inputs.manifest,
        rows=RowRanges.all(inputs.manifest.rows),
        invalid_ids=inputs.invalid_ids,
        worker=worker,
        placement=placement,
        no_progress_timeout_seconds=config.no_progress_timeout_seconds,
    )
