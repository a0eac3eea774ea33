"""`python -m batchcls.jobs.classify`: manifest -> predictions and embeddings, published."""

import logging
import platform
import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from batchcls.config.classify import ClassifyConfig
from batchcls.console import results_console, watching
from batchcls.errors import ExitCode, InputError
from batchcls.identity import BadIds, find_bad_ids
from batchcls.images.load import LoadSettings
from batchcls.images.policies import decode_limits, fetch_policy
from batchcls.inference.predictor import PredictSettings
from batchcls.inference.self_test import with_golden
from batchcls.jobs.command import Command, main
from batchcls.manifest import Manifest, open_manifest
from batchcls.models.bundle import Bundle
from batchcls.models.resolve import ModelChoices, parse_model_arguments, resolve_model
from batchcls.pipeline.graph import Run, Work
from batchcls.pipeline.load_stage import LoadStage
from batchcls.placement import Placement, place
from batchcls.runs.commit import Totals, check_budget, commit, reconcile
from batchcls.runs.layout import new_run_id, run_folder
from batchcls.runs.parts import PartWriter, Receipt
from batchcls.runs.plan import Plan, claim
from batchcls.runs.publish import publish
from batchcls.runtime import nodes, ray_session, wait_for
from batchcls.schema import EMBEDDING_TYPES
from batchcls.storage import Storage, explain, is_remote, join, redact_uri
from batchcls.tables import bundle_line, counts_table
from batchcls.views import Views, views_of

_logger = logging.getLogger("batchcls.jobs.classify")  # __name__ is __main__ here

_EXAMPLES = """examples:
  python -m batchcls.jobs.classify --manifest catalog.parquet --model timm:mobilenetv3_large_100 --output out
  python -m batchcls.jobs.classify --config jobs/classify.toml
  python -m batchcls.jobs.classify --manifest s3://shop/catalog/ --model s3://shop/models/v7 --output s3://shop/out

exit codes: 0 done; 1 unexpected; 2 bad configuration or input, nothing written;
            3 committed, a gate refused the publish; 4 error budget exceeded, not committed
"""


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What was asked for, opened and checked."""

    manifest: Manifest
    bad_ids: BadIds
    bundle: Bundle
    views: Views
    storage: Storage


def classify(config: ClassifyConfig, console: Console) -> ExitCode:
    """Run the job from manifest to publish; errors leave as `errors.BatchclsError`."""
    started = time.perf_counter()
    inputs = _open_inputs(config)
    with ray_session(config.ray_address):
        placement = wait_for(lambda: _place(config, inputs), config.wait_for_cluster_seconds)
        for reason in placement.reasons:
            _logger.info(reason)
        plan = _plan(config, inputs, placement)
        with explain(config.output):
            folder = claim(plan, config.output, inputs.storage)
        _logger.info("run %s in %s", plan.run_id, redact_uri(folder))
        work = _work(config, inputs, placement, plan.run_id)
        receipts, measured = _execute(work, console, config.log_interval_seconds)
    totals = reconcile(receipts, inputs.manifest.rows)
    measured["seconds_total"] = round(time.perf_counter() - started, 3)
    measured["images_per_second_of_work"] = {
        stage: round(totals.rows / seconds, 1)
        for stage, seconds in totals.stage_seconds.items()
        if seconds > 0
    }
    check_budget(totals, config.max_failed_fraction)
    with explain(folder):
        commit(plan, receipts, totals, measured, inputs.storage, folder)
    _summarize(totals, measured, folder)
    _publish(config, plan, inputs.storage)
    return ExitCode.DONE


def _open_inputs(config: ClassifyConfig) -> _Inputs:
    storage = Storage(config.storage_options)
    with explain(config.output):
        # Keys, bucket and network of the output are tried before anything costs time.
        storage.list_files(run_folder(config.output, config.run_id or "none"))
    manifest = open_manifest(
        config.manifest, storage, id_column=config.id_column, keep=config.keep, limit=config.limit
    )
    _logger.info("manifest: %d rows in %d file(s)", manifest.rows, len(manifest.files))
    bad_ids = find_bad_ids(manifest, storage)
    if len(bad_ids.null) or len(bad_ids.repeated):
        _logger.warning("manifest: %d null and %d repeated ids", len(bad_ids.null), len(bad_ids.repeated))
    choices = ModelChoices(
        weights=config.weights,
        labels=config.labels,
        arguments=parse_model_arguments(config.model_args or ""),
        tap=config.embedding_tap,
        allow_random=config.allow_random_weights,
    )
    bundle = resolve_model(config.model, choices, storage)
    if bundle.config.golden is None:
        bundle = with_golden(bundle)
    _logger.info("model: %s", bundle_line(bundle))
    _require_fingerprint(config, bundle)
    _logger.info("embedding: %s", _embedding_line(config, bundle))
    return _Inputs(manifest, bad_ids, bundle, views_of(config.tta, bundle.config.preprocessing), storage)


def _require_fingerprint(config: ClassifyConfig, bundle: Bundle) -> None:
    wanted = config.model_fingerprint
    if wanted is not None and not bundle.fingerprint.startswith(wanted):
        raise InputError(
            f"--model-fingerprint {wanted}: {redact_uri(config.model)} has {bundle.fingerprint}; it is another "
            "model than the one this job is pinned to"
        )


def _embedding_line(config: ClassifyConfig, bundle: Bundle) -> str:
    """What the embedding column will hold."""
    if config.embedding_dtype == "none":
        return "not written"
    length = ", of length 1" if config.l2_normalize else ""
    views = f", mean of the views of {config.tta}" if config.tta != "none" else ""
    made = f"{bundle.config.embedding_dimension} x {config.embedding_dtype}"
    return f"{bundle.config.embedding_tap}, {made}{views}{length}"


def _place(config: ClassifyConfig, inputs: _Inputs) -> Placement:
    manifest = inputs.manifest
    remote = manifest.columns.uri is not None and is_remote(manifest.base)
    return place(config, nodes(), manifest.rows, remote_images=remote)


def _plan(config: ClassifyConfig, inputs: _Inputs, placement: Placement) -> Plan:
    manifest, bundle = inputs.manifest, inputs.bundle
    unpublishable = []
    if not bundle.publishable:
        unpublishable.append("the weights are random, or the head was never trained")
    if config.limit is not None:
        unpublishable.append(f"--limit {config.limit}: a part of the manifest only")
    return Plan(
        run_id=config.run_id or new_run_id(),
        config=config.redacted(),
        manifest={
            "uri": redact_uri(config.manifest),
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
    )


def _work(config: ClassifyConfig, inputs: _Inputs, placement: Placement, run_id: str) -> Work:
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
    )
    return Work(
        manifest=inputs.manifest,
        bad_ids=inputs.bad_ids,
        load=LoadStage(inputs.manifest.columns, inputs.storage, load),
        predict=predict,
        bundle=inputs.bundle,
        precision=config.precision,
        writer=PartWriter(
            run_folder(config.output, run_id), inputs.storage, kept, embedding, bundle.embedding_dimension
        ),
        placement=placement,
        no_progress_timeout_seconds=config.no_progress_timeout_seconds,
    )


def _execute(work: Work, console: Console, interval_seconds: float) -> tuple[list[Receipt], dict[str, Any]]:
    rows = work.manifest.rows
    run = Run(work)
    started = time.perf_counter()
    with watching(run.progress, rows, console, interval_seconds):
        receipts = run.execute()
    seconds = time.perf_counter() - started
    seen = run.progress()
    measured = {
        "seconds_pipeline": round(seconds, 3),
        "images_per_second": round(rows / seconds, 2),
        "engines": dict(seen.engines),
        "peak_memory_mib_of_an_actor": round(seen.peak_memory_mib, 1),
        "hardware": {"nodes": [asdict(node) for node in nodes()], "driver": platform.platform()},
    }
    return receipts, measured


def _summarize(totals: Totals, measured: dict[str, Any], folder: str) -> None:
    """The closing words, on stdout: what a person or a log reader wants to find last."""
    out = results_console()
    out.print(counts_table(totals.predicted, totals.failures))
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in totals.stage_seconds.items())
    out.print(
        f"{totals.rows} rows in {measured['seconds_total']:.1f} s "
        f"({measured['images_per_second']:.1f} images/s in the pipeline)"
    )
    out.print(f"work in seconds, all workers: {stages}")
    out.print(f"results: {redact_uri(folder)}")


def _publish(config: ClassifyConfig, plan: Plan, storage: Storage) -> None:
    out = results_console()
    if plan.unpublishable:
        out.print(f"not published: {'; '.join(plan.unpublishable)}")
    elif not config.publish:
        out.print("not published: --no-publish")
    else:
        with explain(config.output):
            publish(config.output, plan.run_id, storage)
        out.print(f"published: {redact_uri(join(config.output, 'current.json'))}")


COMMANDS = (Command("classify", ClassifyConfig, classify, _EXAMPLES),)

if __name__ == "__main__":
    main("classify", COMMANDS)
