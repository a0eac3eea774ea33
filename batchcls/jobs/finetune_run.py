"""The work of `batchcls finetune`: trains on Ray and writes the bundle."""

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from batchcls.cli.app import resumes_after_interrupt
from batchcls.cli.console import results_console
from batchcls.cli.tables import bundle_line
from batchcls.cluster.job_nodes import JobNodes
from batchcls.cluster.placement import Placement
from batchcls.config.finetune_config import LINEAR_PROBE, FinetuneConfig
from batchcls.errors import BatchclsError, BudgetExceeded, ExitCode, InputError
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.inference.golden_record import with_golden
from batchcls.manifest.ids import values_of_rows
from batchcls.manifest.labeled_manifest import read_label_column
from batchcls.manifest.snapshot import Manifest
from batchcls.models.labels import read_labels
from batchcls.models.model_bundle import CONFIG_FILE, Bundle
from batchcls.ray_runtime import prepare_environment, ray_session, wait_for_cluster
from batchcls.runs.commit import allowed_fraction
from batchcls.runs.lease import Lease
from batchcls.runs.paths import new_run_id
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors
from batchcls.training.batch_plan import StepPlan, limit_workers, plan_steps
from batchcls.training.crop_choice import with_chosen_crop
from batchcls.training.duplicates.duplicate_report import DuplicateReport
from batchcls.training.duplicates.pixel_duplicates import report_pixel_duplicates, without_leaks
from batchcls.training.experiment_tracking import require_mlflow, tracked_run
from batchcls.training.initial_bundle import TrainingExamples, names_architecture, open_frozen_bundle
from batchcls.training.linear_probe.embeddings import EmbeddingSettings
from batchcls.training.linear_probe.fit import LinearSettings
from batchcls.training.linear_probe.probe_job import LinearProbeResult, ProbeSettings, linear_probe_bundle
from batchcls.training.loss import Divergence
from batchcls.training.node_storage import check_nodes
from batchcls.training.pixel_preparation import PreparedPixels, prepare_pixels
from batchcls.training.ray_train import TrainingDivergedError, TrainingRun, run_training
from batchcls.training.sampling import LabeledRows, hold_out
from batchcls.training.scaling import Workers, plan_workers
from batchcls.training.train_config import TrainingSettings
from batchcls.training.train_inputs import TrainingInputs, TrainingManifest, open_inputs, resolve_recipe
from batchcls.training.trained_bundle import TrainingResult, trained_bundle
from batchcls.training.tuning.search import tuned
from batchcls.training.tuning.trials import TuningChoice
from batchcls.training.work_dir import (
    WorkDirRun,
    digest_of,
    find_run,
    finish_run,
    locked_work_dir,
    record_run,
)

NOISE_FILE = "label-noise.parquet"

_logger = logging.getLogger("batchcls.jobs.finetune")


def linear_probe(config: FinetuneConfig, manifests: tuple[Manifest, Manifest], storage: Storage) -> ExitCode:
    """Train a classifier on embeddings, which are cached on disk for later calls."""
    started = time.time()
    with explain(config.output):
        exists = storage.exists(join(config.output, CONFIG_FILE))
    if exists and not config.restart:
        raise InputError(
            f"--output {redact_uri(config.output)} already contains a bundle; choose another folder, or pass --restart "
            "to replace it"
        )
    training, validation = manifests
    examples = TrainingExamples(training, read_label_column(training, storage))
    opened = open_frozen_bundle(config, storage)
    known = None if names_architecture(config) else opened
    bundle, _ = with_chosen_crop(config, opened, known, examples, storage)
    bundle = bundle if bundle.config.golden is not None else with_golden(bundle)
    _logger.info("frozen backbone: %s", bundle_line(bundle))
    cores = len(os.sched_getaffinity(0))
    settings = ProbeSettings(
        embedding=EmbeddingSettings(fetch=fetch_policy(config), limits=decode_limits(config), threads=cores),
        linear=LinearSettings(balance=config.class_balance, seed=config.seed, threads=cores),
        name=new_run_id(),
        labels=read_labels(config.labels, storage) if config.labels is not None else None,
        work_dir=config.work_folder,
        leaks=config.leaks,
    )
    # The embeddings that were computed are kept. With a bundle in the output, the same command is rejected.
    parameters = {"config": config.redacted()}
    with (
        tracked_run(config.mlflow, config.mlflow_experiment, settings.name, parameters) as tracked,
        resumes_after_interrupt(lambda: not config.restart),
    ):
        result = linear_probe_bundle(bundle, training, validation, settings, storage)
        _require_budget(result, training.rows, allowed_fraction(config.max_failed_fraction, training.rows))
        result.bundle.save(config.output, storage)
        tracked.add_metrics(result.metrics)
        tracked.finish(result.bundle, config.output)
    sink = pa.BufferOutputStream()
    pq.write_table(result.noise, sink)
    with resumable_errors(config.work_folder):
        storage.write_atomic(join(config.work_folder, NOISE_FILE), sink.getvalue().to_pybytes())
    _summarize_probe(config, result, time.time() - started)
    return ExitCode.DONE


def _require_budget(result: LinearProbeResult, rows: int, max_fraction: float) -> None:
    failed = result.metrics["training_failed"]
    count = sum(failed.values())
    if count > max_fraction * rows:
        reasons = ", ".join(f"{reason}={number}" for reason, number in failed.items())
        raise BudgetExceeded(
            f"{count} of {rows} training images cannot be used ({reasons}), more than --max-failed-fraction "
            f"{max_fraction:g} allows"
        )


def _summarize_probe(config: FinetuneConfig, result: LinearProbeResult, seconds: float) -> None:
    out = results_console()
    validation = result.metrics["validation"]
    out.print(
        f"{validation['top1']:.2%} top-1 on {validation['predicted']} validation images "
        f"(top-5 {validation['top5']:.1%}, loss {validation['loss']:.3f}) after {seconds:.0f} s"
    )
    out.print(
        f"labels that may be wrong: {result.metrics['confidently_mislabeled']} of "
        f"{result.metrics['training_rows']}, the first {result.noise.num_rows} in "
        f"{redact_uri(join(config.work_folder, NOISE_FILE))}"
    )
    if result.duplicates is not None:
        _print_duplicates(result.duplicates)
    out.print(f"bundle: {redact_uri(config.output)}: {bundle_line(result.bundle)}")


def _print_duplicates(report: DuplicateReport) -> None:
    if report.table.num_rows:
        results_console().print(report.describe())


_MAX_LISTED_ITEMS = 10


def finetune(config: FinetuneConfig, manifests: tuple[Manifest, Manifest], console: Console) -> ExitCode:
    """Train a bundle; errors are raised as `errors.BatchclsError`.

    Args:
        config: settings of the command.
        manifests: the opened manifests of training and validation images, from `input_check.check_finetune`.
        console: console that shows the progress.
    """
    require_mlflow(config.mlflow)
    storage = Storage(config.storage_options)
    with locked_work_dir(config.work_folder, storage) as lease:
        if config.recipe == LINEAR_PROBE:
            return linear_probe(config, manifests, storage)
        with resumes_after_interrupt(lambda: not config.restart), ExitStack() as tracking:
            return _train(config, manifests, lease, console, tracking)


def _train(
    config: FinetuneConfig,
    manifests: tuple[Manifest, Manifest],
    lease: Lease,
    console: Console,
    tracking: ExitStack,
) -> ExitCode:
    started, recipe = time.time(), resolve_recipe(config)
    prepare_environment()
    with ThreadPoolExecutor(1) as executor:
        opening_inputs = executor.submit(open_inputs, config, recipe, manifests)
        with ray_session(config.ray_address):
            inputs = opening_inputs.result()
            result_settings = inputs.result_settings(config)
            if _is_done(config, digest_of(result_settings), inputs.storage):
                return ExitCode.DONE
            work_dir_run, plan, workers, placement = _begin(config, inputs, result_settings)
            parameters = {"config": config.redacted(), "recipe": inputs.recipe.model_dump(mode="json")}
            tracked = tracking.enter_context(
                tracked_run(config.mlflow, config.mlflow_experiment, work_dir_run.run_id, parameters)
            )
            pixels = prepare_pixels(config, inputs, placement, lease, console)
            duplicates = report_pixel_duplicates(
                inputs, pixels, config.work_folder, config.leaks, placement, lease
            )
            settings = _settings(config, inputs, pixels, workers, plan)
            if config.leaks == "remove":
                settings = without_leaks(settings, duplicates, inputs.categories.labels)
            rows = len(settings.training.rows)
            workers = limit_workers(config, workers, plan, rows, inputs.min_micro_batch_size)
            run = TrainingRun(
                work_dir_run.run_id,
                inputs.storage,
                lease,
                console,
                placement,
                tracked.add_epochs,
                inputs.teachers,
            )
            tuning: TuningChoice | None = None
            if config.tune is not None:
                settings, tuning = tuned(config, inputs, settings, pixels[0], workers, run)
            try:
                trained = run_training(config, settings, inputs.initial_bundle, pixels, workers, run)
            except TrainingDivergedError as error:
                raise _divergence_error(error.divergence, inputs) from None
    lineage = {
        "digest": digest_of(result_settings),
        "decides": dict(result_settings),
        "config": config.redacted(),
        "left_out": {"training": len(pixels[0].failed), "validation": len(pixels[1].failed)},
        "workers": str(workers),
        "plan": asdict(plan),
        "crop": None if inputs.crop is None else inputs.crop.model_dump(mode="json"),
        "duplicates": duplicates.counts,
        "teachers": [teacher.lineage() for teacher in inputs.teachers],
        "tuning": None if tuning is None else tuning.model_dump(mode="json"),
    }
    bundle = trained_bundle(inputs.initial_bundle, trained, work_dir_run.run_id, lineage)
    lease.confirm()
    bundle.save(config.output, inputs.storage)
    # Epochs before a failure of the driver or of the server may be missing.
    tracked.add_epochs(trained.history)
    tracked.finish(bundle, config.output)
    finish_run(config.work_folder, inputs.storage)
    if not config.keep_pixels:
        _remove(join(config.work_folder, "pixels"), inputs.storage)
    _summarize(config, bundle, trained, time.time() - started)
    _print_duplicates(duplicates)
    if tuning is not None:
        results_console().print(f"tuning: {tuning}")
    return ExitCode.DONE


def _pixel_bytes(config: FinetuneConfig, inputs: TrainingInputs) -> int:
    """Return the size of the prepared pixels of both manifests. Raises InputError if it exceeds the limit."""
    both = (inputs.training, inputs.validation)
    needed = sum(part.manifest.rows * int(np.prod(part.load.preprocessing.shape)) for part in both)
    if needed > config.max_pixels_gib * 2**30:
        raise InputError(
            f"the prepared pixels need {needed / 2**30:.0f} GiB in {redact_uri(config.work_folder)}, more than "
            f"--max-pixels-gib {config.max_pixels_gib:g}; raise it, or train on fewer images"
        )
    return needed


def _begin(
    config: FinetuneConfig, inputs: TrainingInputs, result_settings: Mapping[str, Any]
) -> tuple[WorkDirRun, StepPlan, Workers, Placement]:
    """Validate everything that can be rejected before pixels are prepared, then record the run."""
    rows, needed = len(inputs.training.labeled_rows()), inputs.min_micro_batch_size
    work_dir_run = find_run(config.work_folder, result_settings, inputs.storage, restart=config.restart)
    step_images = config.batch_size or inputs.recipe.batch_size
    job_nodes = JobNodes(config)
    workers = wait_for_cluster(
        lambda: plan_workers(config, job_nodes.find().nodes, step_images),
        config.wait_for_cluster_seconds,
        lambda: job_nodes.find().job,
    )
    placement = job_nodes.find()
    _logger.info(placement.describe_nodes(placement.nodes))
    if config.device == "auto" and not workers.use_gpu:
        job_nodes.warn_about_missing_gpus(placement)
    plan = work_dir_run.plan or plan_steps(config, inputs.recipe, workers, rows, needed)
    workers = limit_workers(config, workers, plan, rows, needed)
    check_nodes(
        config.work_folder, work_dir_run.run_id, _pixel_bytes(config, inputs), inputs.storage, placement
    )
    record_run(config.work_folder, work_dir_run, result_settings, plan, inputs.storage)
    verb = "resuming" if work_dir_run.is_resumed else "starting"
    _logger.info("%s run %s in %s", verb, work_dir_run.run_id, redact_uri(config.work_folder))
    _logger.info("%s, initial weights: %s", workers, bundle_line(inputs.initial_bundle))
    for teacher in inputs.teachers:
        _logger.info("teacher: %s", bundle_line(teacher.bundle))
    return work_dir_run, plan, workers, placement


def _is_done(config: FinetuneConfig, digest: str, storage: Storage) -> bool:
    """Whether the output folder already contains the result of this command.

    Raises:
        InputError: it contains another bundle.
    """
    with explain(config.output):
        exists = storage.exists(join(config.output, CONFIG_FILE))
    if not exists or config.restart:
        return False
    bundle = Bundle.load(config.output, storage)
    if bundle.config.lineage.get("digest") != digest:
        raise InputError(
            f"--output {redact_uri(config.output)} already contains another bundle ({bundle.config.weights.name}); "
            "choose another folder, or pass --restart to replace it"
        )
    _logger.info(
        "already trained by run %s: %s; pass --restart to train again",
        bundle.config.lineage["run_id"],
        bundle_line(bundle),
    )
    finish_run(config.work_folder, storage)
    return True


def _settings(
    config: FinetuneConfig,
    inputs: TrainingInputs,
    pixels: tuple[PreparedPixels, PreparedPixels],
    workers: Workers,
    plan: StepPlan,
) -> TrainingSettings:
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if workers.use_gpu else "fp32"
    start = inputs.initial_bundle.config
    training = _rows_of(inputs.training, pixels[0], "training")
    held_out = None
    if config.final_held_out_fraction:
        training, held_out = hold_out(training, config.final_held_out_fraction, config.seed)
    return TrainingSettings(
        recipe=plan.applied_to(inputs.recipe, config),
        preprocessing=start.preprocessing,
        classes=len(start.labels),
        trainable=start.trainable,
        training=training,
        validation=_rows_of(inputs.validation, pixels[1], "validation"),
        held_out=held_out,
        patience=config.patience,
        balance=config.class_balance,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        precision=precision,
        loader_processes=workers.loader_processes,
        min_step_size=plan.min_step_size,
        min_micro_batch_size=inputs.min_micro_batch_size,
    )


def _rows_of(labeled: TrainingManifest, pixels: PreparedPixels, which: str) -> LabeledRows:
    rows = labeled.labeled_rows()
    rows = rows[pixels.has_image(rows)]
    if len(rows) == 0:
        raise InputError(f"no {which} row has both a label and a readable image; check the manifest")
    return LabeledRows(rows, labeled.classes[rows])


def _divergence_error(divergence: Divergence, inputs: TrainingInputs) -> BatchclsError:
    manifest = inputs.training.manifest
    rows = np.array(divergence.rows[:_MAX_LISTED_ITEMS], np.int64)
    ids = values_of_rows(manifest, manifest.columns.item_id, rows, inputs.storage).to_pylist()
    more = (
        f" and {len(divergence.rows) - _MAX_LISTED_ITEMS} more"
        if len(divergence.rows) > _MAX_LISTED_ITEMS
        else ""
    )
    what = (
        "the gradient is not finite, but all losses are"
        if divergence.loss_is_finite
        else "the loss is not finite"
    )
    return BatchclsError(
        f"training diverged in step {divergence.step} of epoch {divergence.epoch}: {what}, items "
        f"{', '.join(map(str, ids))}{more}; check these images, or reduce --learning-rate and --head-learning-rate"
    )


def _remove(folder: str, storage: Storage) -> None:
    with explain(folder):
        filesystem, path = storage.filesystem(folder)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


def _summarize(config: FinetuneConfig, bundle: Bundle, trained: TrainingResult, seconds: float) -> None:
    out = results_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "epoch",
        "crop",
        "loss",
        "training",
        "validation",
        "top-5",
        "validation loss",
        "images/s",
        "s",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for record in trained.history:
        table.add_row(
            str(record["epoch"]),
            "{}x{}".format(*record["crop_pixels"]),
            f"{record['loss']:.3f}",
            f"{record['top1']:.1%}",
            f"{record['validation_top1']:.2%}",
            f"{record['validation_top5']:.1%}",
            f"{record['validation_loss']:.3f}",
            f"{record['images_per_second']:.1f}",
            f"{record['seconds'] + record['validation_seconds']:.0f}",
        )
    out.print(table)
    training = sum(record["seconds"] + record["validation_seconds"] for record in trained.history)
    record = trained.record
    selected = "" if trained.epoch is None else f" with the weights of epoch {trained.epoch}"
    out.print(
        f"{record['validation_top1']:.2%} top-1 on {record['validation_rows']} validation images{selected} after "
        f"{training:.0f} s of training ({seconds:.0f} s in total)"
    )
    out.print(f"bundle: {redact_uri(config.output)}: {bundle_line(bundle)}")
    out.print(f"curves: tensorboard --logdir {redact_uri(join(config.work_folder, 'curves'))}")
