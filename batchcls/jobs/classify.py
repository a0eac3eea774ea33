"""`python -m batchcls.jobs.classify`: manifest -> predictions and embeddings, published."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console

from batchcls.config.classify import ClassifyConfig
from batchcls.console import results_console
from batchcls.errors import ExitCode
from batchcls.images.policies import decode_limits, fetch_policy
from batchcls.images.settings import LoadSettings
from batchcls.inference.abstention import Abstention
from batchcls.inference.settings import PredictSettings
from batchcls.jobs.classify_inputs import Inputs, open_inputs
from batchcls.jobs.command import Command, main
from batchcls.pipeline.execute import execute
from batchcls.pipeline.settle import Settled, settle_engines
from batchcls.pipeline.work import Load, Work
from batchcls.placement import Placement, place
from batchcls.runs.bottleneck import Bottleneck, find_bottleneck
from batchcls.runs.commit import Totals, check_budget, commit, reconcile
from batchcls.runs.layout import new_run_id, run_folder
from batchcls.runs.parts import PartWriter
from batchcls.runs.plan import Plan, claim
from batchcls.runs.publish import publish
from batchcls.runtime import nodes, ray_session, wait_for
from batchcls.schema import EMBEDDING_TYPES
from batchcls.storage import Storage, explain, join, redact_uri
from batchcls.tables import bottleneck_table, counts_table

_logger = logging.getLogger("batchcls.jobs.classify")  # __name__ is __main__ here

_EXAMPLES = """examples:
  python -m batchcls.jobs.classify --manifest catalog.parquet --model timm:mobilenetv3_large_100 --output out
  python -m batchcls.jobs.classify --config jobs/classify.toml
  python -m batchcls.jobs.classify --manifest s3://shop/catalog/ --model s3://shop/models/v7 --output s3://shop/out

exit codes: 0 done; 1 unexpected; 2 bad configuration or input, nothing written;
            3 committed, a gate refused the publish; 4 error budget exceeded, not committed
"""


def classify(config: ClassifyConfig, console: Console) -> ExitCode:
    """Run the job from manifest to publish; errors leave as `errors.BatchclsError`."""
    started = time.time()
    # Ray takes seconds to start, most of them waiting; the inputs are opened meanwhile.
    with ThreadPoolExecutor(1) as aside:
        opening = aside.submit(open_inputs, config)
        with ray_session(config.ray_address):
            inputs = opening.result()
            placement = wait_for(lambda: _place(config, inputs), config.wait_for_cluster_seconds)
            for reason in placement.reasons:
                _logger.info(reason)
            settled = settle_engines(config, inputs.manifest, inputs.bundle, placement, inputs.storage)
            plan = _plan(config, inputs, placement)
            with explain(config.output):
                folder = claim(plan, config.output, inputs.storage)
            _logger.info("run %s in %s", plan.run_id, redact_uri(folder))
            work = work_of(config, inputs, placement, settled, plan.run_id)
            executed = execute(work, console, config.log_interval_seconds)
    totals = reconcile(executed.receipts, inputs.manifest.rows)
    found = find_bottleneck(executed.measured(totals.stage_seconds, bool(settled.measured)))
    measured = executed.as_json() | {
        "seconds_total": round(time.time() - started, 3),
        "seconds_to_first_part": round(executed.first_part_at - started, 3),
        "bottleneck": found.as_json(),
        "decode_margin": settled.decode_margin,
        "engine_choices": [choice.model_dump(mode="json") for choice in settled.measured],
    }
    check_budget(totals, config.max_failed_fraction)
    with explain(folder):
        commit(plan, executed.receipts, totals, measured, inputs.storage, folder)
    _summarize(totals, measured, found, folder)
    _publish(config, plan, inputs.storage)
    return ExitCode.DONE


def _place(config: ClassifyConfig, inputs: Inputs) -> Placement:
    return place(config, nodes(), remote_images=inputs.has_remote_images, rows=inputs.manifest.rows)


def _plan(config: ClassifyConfig, inputs: Inputs, placement: Placement) -> Plan:
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


def work_of(
    config: ClassifyConfig, inputs: Inputs, placement: Placement, settled: Settled, run_id: str
) -> Work:
    """What the workers are given, from the settings and what was opened and settled."""
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


def _summarize(totals: Totals, measured: dict[str, Any], found: Bottleneck, folder: str) -> None:
    """The closing words, on stdout: what a person or a log reader wants to find last."""
    out = results_console()
    out.print(counts_table(totals.predicted, totals.failures, totals.abstained))
    out.print(bottleneck_table(found))
    out.print(
        f"{totals.rows} rows in {measured['seconds_total']:.1f} s "
        f"({measured['images_per_second']:.1f} images/s in the pipeline, {found.achieved:.1f} after start-up)"
    )
    out.print(f"advice: {found.advice}")
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
