"""The work of `batchcls evaluate`: evaluates a bundle or a run and writes the report."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from batchcls.cli.console import results_console, show_progress
from batchcls.cli.evaluation_tables import metrics_table, worst_categories_table
from batchcls.cli.tables import bundle_line
from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.errors import ExitCode, stop_run_on_input_error
from batchcls.evaluation.classification_metrics import Rows
from batchcls.evaluation.evaluation_outputs import (
    EPOCH,
    Curves,
    EvaluationSubject,
    limitations,
    read_curves,
    thumbnails,
    worst_pairs,
    write_outputs,
)
from batchcls.evaluation.evaluator import EvaluationResult, evaluate_logits, evaluate_outcomes
from batchcls.evaluation.hierarchy import Path
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.evaluation.model_predictions import LabeledPredictor, allocate_logits
from batchcls.evaluation.run_predictions import open_evaluated_run, read_run_predictions
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.manifest.snapshot import Manifest
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Device, EngineChoice, EngineConfig
from batchcls.models.engines.factory import describe_engine
from batchcls.models.model_bundle import Bundle, Calibration
from batchcls.preprocessing import Preprocessing, Views, views_of
from batchcls.report.evaluate_page import PageParts, evaluate_page, findings
from batchcls.report.evaluate_plots import Curve
from batchcls.storage.filesystem import Storage, is_remote, redact_uri

_logger = logging.getLogger("batchcls.jobs.evaluate")


_REMOTE_REQUESTS = 16
_CATEGORIES_SHOWN = 10
_ANY_SIZE = Preprocessing(
    input_height=8, input_width=8, resize_height=8, resize_width=8, mean=(0, 0, 0), std=(1, 1, 1)
)


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """Result of a bundle or a run, and the rows that it refers to.

    Attributes:
        result: Metrics, calibration and thresholds.
        notes: Table of all rows with the schema `labeled_rows.NOTES`.
        rows: Row numbers of the evaluated rows.
        model: Description of the bundle or the run, as JSON values.
        curves: Training curves, if known.
    """

    result: EvaluationResult
    notes: pa.Table
    rows: Rows
    model: Mapping[str, Any]
    curves: Curves


def evaluate(config: EvaluateConfig, manifest: Manifest, console: Console) -> ExitCode:
    """Evaluate the bundle or the run and write all outputs. Raises `BatchclsError` on expected errors.

    Args:
        config: settings of the command.
        manifest: the opened manifest, from `input_check.check_evaluate`.
        console: console that shows the progress.
    """
    storage = Storage(config.storage_options)
    labeled = read_labeled(config, manifest, storage)
    if config.model is not None:
        bundle = Bundle.load(config.model, storage)
        _logger.info("model: %s", bundle_line(bundle))
        evaluation = _evaluate_bundle(config, bundle, labeled, console)
    else:
        evaluation = _evaluate_run(config, labeled)
    subject = EvaluationSubject(
        created=datetime.now(UTC),
        settings=config.redacted(),
        manifest=labeled.manifest.fingerprint,
        model=evaluation.model,
        notes=evaluation.notes,
        rows=evaluation.rows,
    )
    page = _page(config, evaluation, subject, labeled)
    written = write_outputs(evaluation.result, subject, page, config.output, storage)
    if config.write_bundle is not None:
        calibration = evaluation.result.calibration(subject.manifest, config.tta)
        with stop_run_on_input_error():
            uri = _write_bundle(config.write_bundle, bundle, calibration, evaluation.result.paths, storage)
        written.append(uri)
    _print_results(evaluation.result, subject, written)
    return ExitCode.DONE


def read_labeled(config: EvaluateConfig, manifest: Manifest, storage: Storage) -> LabeledManifest:
    """Read the labels of the job's manifest. Raises InputError if it cannot be read or has no labels."""
    labeled = LabeledManifest.read(manifest, storage)
    _logger.info("manifest: %s in column %s", labeled.labels.describe(), config.label_column)
    return labeled


def _evaluate_bundle(
    config: EvaluateConfig, bundle: Bundle, labeled: LabeledManifest, console: Console
) -> _Evaluation:
    curves = read_curves(config.training_curves, bundle.config.lineage, labeled.storage)
    labels = bundle.config.labels
    paths = _paths(config, labels, bundle.config.category_paths)
    views = views_of(config.tta, bundle.config.preprocessing)
    load = load_settings(config, labeled, bundle.config.preprocessing, views)
    choice = EngineChoice(config.engine, config.precision)
    engine, _ = start_tested_engine(bundle, choice, engine_config(config))
    _logger.info("engine: %s", describe_engine(engine))
    predictor = LabeledPredictor(labeled, labels, engine)
    rows = labeled.manifest.rows
    with allocate_logits(rows * views.count, len(labels)) as buffer:
        with show_progress(lambda: predictor, rows, console, config.log_interval_seconds):
            notes, evaluated_rows, store = predictor.run(load, buffer)
        _logger.info("predicted %d rows; fitting calibration", len(store))
        result = evaluate_logits(store, paths, config.target_precision)
    assert config.model is not None
    model = {
        "bundle": redact_uri(config.model),
        "fingerprint": bundle.fingerprint,
        "architecture": str(bundle.config.spec),
        "engine": describe_engine(engine),
    }
    return _Evaluation(result, notes, evaluated_rows, model, curves)


def _evaluate_run(config: EvaluateConfig, labeled: LabeledManifest) -> _Evaluation:
    assert config.run is not None
    curves = read_curves(config.training_curves, {}, labeled.storage)
    run = open_evaluated_run(config.run, labeled.storage)
    notes, rows, outcomes, ranked_categories = read_run_predictions(run, labeled, labeled.storage)
    paths = _paths(config, outcomes.labels, None)
    result = evaluate_outcomes(outcomes, ranked_categories, paths, config.target_precision)
    model = {
        "run": run.record.run_id,
        "fingerprint": run.record.model.fingerprint,
        "architecture": run.record.model.architecture,
    }
    return _Evaluation(result, notes, rows, model, curves)


def _paths(
    config: EvaluateConfig, labels: Sequence[str], bundle_paths: Sequence[Path] | None
) -> Sequence[Path] | None:
    """Category paths of the bundle, or else of the labels with --labels-are-paths."""
    if bundle_paths is None and config.labels_are_paths:
        return [tuple(label.split("/")) for label in labels]
    return bundle_paths


def engine_config(config: EvaluateConfig) -> EngineConfig:
    """Device and resources of the engines of the job."""
    device: Device = "cpu"
    if config.device != "auto":
        device = config.device
    elif config.engine != "openvino" and torch.cuda.is_available():
        device = "cuda"
    return EngineConfig(
        device, torch.get_num_threads(), config.batch_size, CompileCache.from_cache_dir(config.cache_dir)
    )


def load_settings(
    config: EvaluateConfig, labeled: LabeledManifest, preprocessing: Preprocessing, views: Views
) -> LoadSettings:
    """Settings for loading the images of the manifest with a preprocessing."""
    cores = torch.get_num_threads()
    return LoadSettings(
        base=labeled.manifest.base,
        fetch=fetch_policy(config),
        limits=decode_limits(config),
        preprocessing=preprocessing,
        views=views,
        fetch_threads=max(cores, _REMOTE_REQUESTS if is_remote(labeled.manifest.base) else 1),
        decode_threads=cores,
        block_rows=config.batch_size,
    )


def _page(
    config: EvaluateConfig, evaluation: _Evaluation, subject: EvaluationSubject, labeled: LabeledManifest
) -> str:
    pairs = worst_pairs(evaluation.result, evaluation.rows)
    epochs = evaluation.curves.get(EPOCH, [])
    parts = PageParts(
        title=f"Evaluation of {redact_uri(config.model or config.run or '')}",
        manifest=redact_uri(config.manifest),
        version=version("batchcls"),
        pairs=pairs,
        images=thumbnails(pairs, labeled, load_settings(config, labeled, _ANY_SIZE, Views())),
        curves=[
            Curve(name.replace("_", " "), epochs, values)
            for name, values in evaluation.curves.items()
            if name != EPOCH
        ],
    )
    return evaluate_page(evaluation.result, subject, parts)


def _write_bundle(
    uri: str, bundle: Bundle, calibration: Calibration, paths: Sequence[Path] | None, storage: Storage
) -> str:
    """Write the bundle with the calibration. The golden outputs stay valid: they are stored at temperature 1."""
    # Thresholds of a cascade belong to the probabilities of the earlier calibration.
    changes: dict[str, Any] = {"calibration": calibration, "cascade": None}
    if bundle.config.category_paths is None and paths is not None:
        changes["category_paths"] = paths
    record = bundle.config.model_dump() | changes
    calibrated = Bundle(type(bundle.config).model_validate(record), bundle.weights)
    calibrated.save(uri, storage)
    _logger.info("calibrated bundle %s: fingerprint %s", redact_uri(uri), calibrated.fingerprint[:12])
    return uri


def _print_results(result: EvaluationResult, subject: EvaluationSubject, written: Sequence[str]) -> None:
    """Print the metrics, the findings and the output URIs to stdout."""
    out = results_console()
    out.print(metrics_table(result))
    out.print(worst_categories_table(result, _CATEGORIES_SHOWN))
    for sentence in findings(result):
        out.print(sentence)
    for reason, count in subject.excluded.most_common():
        out.print(f"excluded: {count} ({reason})")
    for line in limitations(result):
        out.print(f"note: {line}")
    for uri in written:
        out.print(f"results: {redact_uri(uri)}")
