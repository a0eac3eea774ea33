"""The plan of a run and the orders for its workers, from the settings and what was opened."""

from batchcls.config.classify import ClassifyConfig
from batchcls.images.policies import decode_limits, fetch_policy
from batchcls.images.settings import LoadSettings
from batchcls.inference.abstention import Abstention
from batchcls.inference.settings import PredictSettings
from batchcls.jobs.classify_inputs import Inputs
from batchcls.pipeline.settle import Settled
from batchcls.pipeline.work import Load, Work
from batchcls.placement import Placement
from batchcls.row_ranges import RowRanges
from batchcls.runs.fingerprints import Fingerprints, answers_of
from batchcls.runs.layout import run_folder
from batchcls.runs.parts import PartWriter
from batchcls.runs.plan import Plan
from batchcls.schema import EMBEDDING_TYPES
from batchcls.storage import redact_uri
from batchcls.uris import real_place


def fingerprints_of(config: ClassifyConfig, inputs: Inputs) -> Fingerprints:
    """What the run is about."""
    return Fingerprints.of(config, inputs.manifest.fingerprint, inputs.bundle.fingerprint)


def plan_of(
    config: ClassifyConfig, inputs: Inputs, placement: Placement, settled: Settled, run_id: str
) -> Plan:
    """The plan of a run."""
    manifest, bundle = inputs.manifest, inputs.bundle
    fingerprints = fingerprints_of(config, inputs)
    unpublishable = []
    if not bundle.publishable:
        unpublishable.append("the weights are random, or the head was never trained")
    if config.limit is not None:
        unpublishable.append(f"--limit {config.limit}: a part of the manifest only")
    return Plan(
        run_id=run_id,
        config=config.redacted(),
        manifest={
            "uri": redact_uri(config.manifest),
            "base": real_place(manifest.base),
            "fingerprint": manifest.fingerprint,
            "rows": manifest.rows,
            "files": len(manifest.files),
        },
        model={
            "fingerprint": bundle.fingerprint,
            "source": bundle.config.source,
            "architecture": bundle.config.architecture,
            "classes": len(bundle.config.labels),
            "preprocessing": bundle.config.preprocessing.model_dump(mode="json"),
            "embedding_tap": bundle.config.embedding_tap,
            "weights": bundle.config.weights.model_dump(mode="json"),
        },
        placement=placement.as_json(),
        unpublishable=unpublishable,
        fingerprints=fingerprints,
        engines=settled.as_json(),
        answers=answers_of(fingerprints, settled.precisions, settled.decode_margin),
    )


def work_of(
    config: ClassifyConfig, inputs: Inputs, placement: Placement, settled: Settled, run_id: str
) -> Work:
    """What the workers are given; all rows of the manifest are to be done."""
    kept = inputs.manifest.columns.kept
    bundle = inputs.bundle.config
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
        fetch_threads=placement.fetch_threads,
        decode_threads=placement.decode_threads,
        block_rows=placement.block_rows,
        decode_margin=settled.decode_margin,
    )
    predict = PredictSettings(
        labels=tuple(bundle.labels),
        top_k=config.top_k,
        embedding=embedding,
        embedding_dimension=bundle.embedding_dimension,
        l2_normalize=config.l2_normalize,
        views=inputs.views,
        input_shape=bundle.preprocessing.shape,
        normalize=config.normalize,
        batch_size=placement.batch_size,
        kept=kept,
        temperature=bundle.calibration.temperature if bundle.calibration else 1.0,
        abstention=Abstention.of(bundle) if config.abstain else None,
    )
    return Work(
        manifest=inputs.manifest,
        todo=RowRanges.all(inputs.manifest.rows),
        bad_ids=inputs.bad_ids,
        load=Load(inputs.manifest.columns, inputs.storage, load),
        predict=predict,
        bundle=inputs.bundle,
        engines=settled.engines,
        writer=PartWriter(
            run_folder(config.output, run_id),
            inputs.storage,
            kept,
            embedding,
            bundle.embedding_dimension,
            abstain=config.abstain,
        ),
        placement=placement,
        no_progress_timeout_seconds=config.no_progress_timeout_seconds,
    )
