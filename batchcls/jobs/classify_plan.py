"""Plan a run of the classify job: check and open its inputs, and derive the plan and the pipeline from them."""

import logging
from dataclasses import dataclass, replace

from batchcls.cluster.job_nodes import JobNodes
from batchcls.cluster.placement import Placement
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.inference.abstention import Abstention
from batchcls.inference.predictor_config import PredictSettings
from batchcls.jobs.classify_models import (
    OpenedModels,
    PreparedCascade,
    PreparedModel,
    check_models,
    open_models,
    prepare_cascade,
    read_map,
)
from batchcls.manifest.ids import InvalidIds, find_invalid_ids
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.models.classifier_head import ClassifierHead
from batchcls.models.engines.factory import missing_package
from batchcls.models.label_map import LabelMap
from batchcls.models.model_bundle import Bundle, BundleConfig
from batchcls.pipeline.node_engines import EngineSelection
from batchcls.pipeline.pipeline_spec import LargeNetwork, LoadSpec, PipelineSpec, WorkerSpec
from batchcls.preprocessing import Preprocessing
from batchcls.ray_runtime import wait_for_cluster
from batchcls.resources import ResourcePlan, plan_resources
from batchcls.runs.parts import PartWriter
from batchcls.runs.paths import run_folder
from batchcls.runs.plan import Fingerprints, Plan, prediction_settings
from batchcls.runs.records import CascadeInfo, ManifestInfo, ModelInfo
from batchcls.runs.split_labels import can_be_compared
from batchcls.schema import EMBEDDING_TYPES, ITEM_ID, LARGE, SMALL, URI
from batchcls.storage.filesystem import Storage, explain, is_remote, redact_uri
from batchcls.storage.uris import canonical_location

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClassifyInputs:
    """The opened manifest and models of a run, and access to storage.

    `model` is the only network or the small one of a cascade. `head` is its classifier, from which predictions for its
    embeddings can be computed; None if they cannot, as with a cascade.
    """

    manifest: Manifest
    invalid_ids: InvalidIds
    models: OpenedModels
    model: PreparedModel
    cascade: PreparedCascade | None
    head: ClassifierHead | None
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
    label_map = read_map(config, storage)
    check_models(config, label_map, storage)
    with explain(config.output):
        # Credentials, bucket and network of the output are checked before any work starts.
        storage.list_files(run_folder(config.output, config.run_id or "none"))
    manifest = open_manifest(
        config.manifest, storage, id_column=config.id_column, keep=config.keep, limit=config.limit
    )
    _logger.info("manifest: %d rows in %d file(s)", manifest.rows, len(manifest.files))
    _require_split_columns(label_map, manifest)
    return manifest


def open_inputs(
    config: ClassifyConfig, manifest: Manifest, models: OpenedModels | None = None
) -> ClassifyInputs:
    """Open everything that a run reads, after `check_inputs`; `models` if `open_models` has opened them already.

    Raises:
        InputError: an input cannot be read or does not match the settings.
    """
    storage = Storage(config.storage_options)
    invalid_ids = find_invalid_ids(manifest, storage)
    if len(invalid_ids.null) or len(invalid_ids.duplicate):
        _logger.warning(
            "manifest: %d null and %d repeated ids", len(invalid_ids.null), len(invalid_ids.duplicate)
        )
    models = models or open_models(config, storage)
    _logger.info("embedding: %s", _embedding_line(config, models.bundle))
    label_map = read_map(config, storage)
    model = PreparedModel.of(config, models.bundle, label_map)
    if label_map is not None:
        _logger.info(
            "label map: %d labels of the bundle become %d, before splits",
            len(models.bundle.config.labels),
            len(model.mapped.config.labels),
        )
    return ClassifyInputs(
        manifest=manifest,
        invalid_ids=invalid_ids,
        models=models,
        model=model,
        cascade=prepare_cascade(config, models, label_map),
        head=model.head if models.large is None else None,
        storage=storage,
    )


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
        config, inputs.manifest.fingerprint, inputs.models.fingerprint, inputs.model.mapped.label_map
    )


def plan_of(
    config: ClassifyConfig,
    inputs: ClassifyInputs,
    resource_plan: ResourcePlan,
    selection: EngineSelection,
    run_id: str,
) -> Plan:
    """The plan of a run."""
    manifest, bundle, mapped = inputs.manifest, inputs.models.bundle, inputs.model.mapped
    fingerprints = fingerprints_of(config, inputs)
    unpublishable = []
    if not all(opened.publishable for opened in inputs.models.bundles):
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
            fingerprint=inputs.models.fingerprint,
            layers=inputs.model.layers,
            source=bundle.config.source,
            architecture=bundle.config.architecture,
            classes=len(mapped.config.labels),
            label_map=mapped.label_map,
            groups=mapped.groups,
            preprocessing=bundle.config.preprocessing,
            embedding_tap=bundle.config.embedding_tap,
            weights=bundle.config.weights,
            cascade=_cascade_info(inputs),
        ),
        resources=resource_plan,
        unpublishable=tuple(unpublishable),
        fingerprints=fingerprints,
        engines=selection.recorded(),
        result_settings=prediction_settings(
            config,
            selection.precisions,
            selection.decode_margin,
            None if selection.large is None else selection.large.precisions,
        ),
    )


def _cascade_info(inputs: ClassifyInputs) -> CascadeInfo | None:
    cascade = inputs.cascade
    if cascade is None:
        return None
    large = cascade.model.bundle
    return CascadeInfo(
        small=inputs.models.bundle.fingerprint,
        large=large.fingerprint,
        layers=cascade.model.layers,
        source=large.config.source,
        architecture=large.config.architecture,
        preprocessing=large.config.preprocessing,
        weights=large.config.weights,
        thresholds=cascade.thresholds,
        expected_fraction=cascade.expected_fraction,
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
    bundle, cascade = inputs.models.bundle.config, inputs.cascade
    embedding = EMBEDDING_TYPES[config.embedding_dtype]
    load = LoadSettings(
        run_id=run_id,
        base=inputs.manifest.base,
        kept=kept,
        fetch=fetch_policy(config),
        limits=decode_limits(config),
        preprocessing=bundle.preprocessing,
        large_preprocessing=None if cascade is None else _second_preprocessing(config, bundle, cascade),
        views=inputs.model.views,
        normalize=config.normalize,
        fetch_threads=resource_plan.fetch_threads,
        decode_threads=resource_plan.decode_threads,
        block_rows=resource_plan.block_rows,
        decode_margin=selection.decode_margin,
        share_predictions=config.share_predictions,
    )
    predict = replace(
        _predict_settings(config, inputs.model, resource_plan),
        embedding=embedding,
        l2_normalize=config.l2_normalize,
        kept=kept,
        predicted_by=None if cascade is None else SMALL,
    )
    worker = WorkerSpec(
        bundle=inputs.models.bundle,
        fingerprint=inputs.models.bundle.fingerprint,
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
            label_map=inputs.model.mapped.label_map,
            cascade=cascade is not None,
        ),
        resources=resource_plan,
        large=_large_network(config, inputs, resource_plan, selection),
    )
    return PipelineSpec(
        manifest=inputs.manifest,
        rows=RowRanges.all(inputs.manifest.rows),
        invalid_ids=inputs.invalid_ids,
        worker=worker,
        placement=placement,
        no_progress_timeout_seconds=config.no_progress_timeout_seconds,
    )


def _predict_settings(config: ClassifyConfig, model: PreparedModel, plan: ResourcePlan) -> PredictSettings:
    """The settings of a network without embedding and kept columns."""
    bundle, mapped = model.bundle.config, model.mapped
    return PredictSettings(
        labels=tuple(mapped.config.labels),
        top_k=config.top_k,
        embedding=None,
        embedding_dimension=bundle.embedding_dimension,
        l2_normalize=False,
        views=model.views,
        input_shape=bundle.preprocessing.shape,
        normalize=config.normalize,
        batch_size=plan.batch_size,
        kept=(),
        temperature=bundle.calibration.temperature if bundle.calibration else 1.0,
        abstention=Abstention.from_bundle(mapped.config) if config.abstain else None,
        groups=mapped.groups,
    )


def _large_network(
    config: ClassifyConfig, inputs: ClassifyInputs, plan: ResourcePlan, selection: EngineSelection
) -> LargeNetwork | None:
    cascade = inputs.cascade
    if cascade is None or selection.large is None:
        return None
    return LargeNetwork(
        bundle=cascade.model.bundle,
        fingerprint=cascade.model.bundle.fingerprint,
        engines=selection.large.engines,
        predict=replace(_predict_settings(config, cascade.model, plan), predicted_by=LARGE),
        thresholds=cascade.thresholds_of(inputs.model.mapped),
    )


def _second_preprocessing(
    config: ClassifyConfig, small: BundleConfig, cascade: PreparedCascade
) -> Preprocessing | None:
    """The preprocessing of the large network if it does not take the pixels of the small one."""
    large = cascade.model.bundle.config.preprocessing
    # Mean and standard deviation are applied by the engine, except that images are padded with the mean.
    if config.normalize == "engine" and large.crop_mode != "border":
        is_same = small.preprocessing.model_copy(update={"mean": large.mean, "std": large.std}) == large
    else:
        is_same = small.preprocessing == large
    return None if is_same else large
