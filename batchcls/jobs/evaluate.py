"""`batchcls evaluate`: labeled rows and a bundle or a run -> how right, how sure, from where on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from batchcls.cli.app import Command, main
from batchcls.cli.console import results_console, watching
from batchcls.cli.tables import bundle_line, metrics_table, worst_categories_table
from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.errors import ExitCode, InputError, stop_run_on_input_error
from batchcls.evaluation.classification_metrics import Rows
from batchcls.evaluation.evaluation_outputs import (
    EPOCH,
    Curves,
    EvaluationSubject,
    approximations,
    read_curves,
    thumbnails,
    worst_pairs,
    write_outputs,
)
from batchcls.evaluation.evaluator import Evaluated, evaluate_answers, evaluate_outcomes
from batchcls.evaluation.hierarchy import Path
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.evaluation.model_predictions import Answering, room_for_logits
from batchcls.evaluation.run_predictions import open_run, read_answers
from batchcls.images.load_config import LoadSettings, decode_limits, fetch_policy
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Device, EngineChoice, EngineConfig
from batchcls.models.engines.factory import describe_engine
from batchcls.models.model_bundle import Bundle, Calibration
from batchcls.preprocessing import Preprocessing, Views, views_of
from batchcls.report.evaluate_page import PageParts, evaluate_page, verdict
from batchcls.report.evaluate_plots import Curve
from batchcls.storage.filesystem import Storage, explain, is_remote, redact_uri

_logger = logging.getLogger("batchcls.jobs.evaluate")  # __name__ is __main__ here

_EXAMPLES = """examples:
  batchcls evaluate --manifest validation.parquet --model models/v1 --output evaluated
  batchcls evaluate --manifest validation.parquet --model models/v1 --output evaluated \\
      --target-precision 0.95 --write-bundle models/v1-calibrated
  batchcls evaluate --manifest s3://shop/labeled/ --run s3://shop/out --output s3://shop/evaluated
  batchcls evaluate --config jobs/evaluate.toml

Then `batchcls classify --model models/v1-calibrated --abstain ...` leaves a label null where the
model is not sure enough.
exit codes: 0 done; 1 unexpected; 2 bad configuration or input, nothing written; 4 stopped after a part was written;
            130 interrupted
"""

_REMOTE_REQUESTS = 16
_CATEGORIES_SHOWN = 10
_ANY_SIZE = Preprocessing(
    input_height=8, input_width=8, resize_height=8, resize_width=8, mean=(0, 0, 0), std=(1, 1, 1)
)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What was found, `labeled.NOTES` of all rows, the judged rows' numbers, what was judged, and its training."""

    found: Evaluated
    notes: pa.Table
    rows: Rows
    model: Mapping[str, Any]
    curves: Curves


def evaluate(config: EvaluateConfig, console: Console) -> ExitCode:
    """Run the job from manifest to page; errors leave as `errors.BatchclsError`."""
    storage = Storage(config.storage_options)
    _check(config, storage)
    labeled = LabeledManifest.open(
        config.manifest,
        storage,
        id_column=config.id_column,
        label_column=config.label_column,
        limit=config.limit,
    )
    _logger.info("manifest: %s in column %s", labeled.labels.describe(), config.label_column)
    if config.model is not None:
        bundle = Bundle.load(config.model, storage)
        _logger.info("model: %s", bundle_line(bundle))
        judged = _judge_bundle(config, bundle, labeled, console)
    else:
        judged = _judge_run(config, labeled)
    subject = EvaluationSubject(
        created=datetime.now(UTC),
        settings=config.redacted(),
        manifest=labeled.manifest.fingerprint,
        model=judged.model,
        notes=judged.notes,
        rows=judged.rows,
    )
    page = _page(config, judged, subject, labeled)
    written = write_outputs(judged.found, subject, page, config.output, storage)
    if config.write_bundle is not None:
        calibration = judged.found.calibration(subject.manifest, config.tta)
        with stop_run_on_input_error():
            uri = _write_bundle(config.write_bundle, bundle, calibration, judged.found.paths, storage)
        written.append(uri)
    _show(judged.found, subject, written)
    return ExitCode.DONE


def _check(config: EvaluateConfig, storage: Storage) -> None:
    """Refuse what cannot work before it costs time."""
    if (config.model is None) == (config.run is None):
        raise InputError("name what is to be judged, either --model BUNDLE or --run OUTPUT/runs/ID")
    if config.model is None and config.write_bundle is not None:
        raise InputError(
            "--write-bundle: a run keeps no logits, so there is no temperature; use --model BUNDLE"
        )
    if config.model is None and config.tta != "none":
        raise InputError(
            "--tta: a run has averaged its views already; leave the flag out, or use --model BUNDLE"
        )
    for place in (config.output, config.write_bundle):
        if place is not None:
            with explain(place):
                storage.list_files(place)


def _judge_bundle(
    config: EvaluateConfig, bundle: Bundle, labeled: LabeledManifest, console: Console
) -> _Judged:
    curves = read_curves(config.training_curves, bundle.config.lineage, labeled.storage)
    labels = bundle.config.labels
    paths = _paths(config, labels, bundle.config.category_paths)
    views = views_of(config.tta, bundle.config.preprocessing)
    load = _load(config, labeled, bundle.config.preprocessing, views)
    choice, place = EngineChoice(config.engine, config.precision), _place(config)
    engine, _ = start_tested_engine(bundle, choice, place)
    _logger.info("engine: %s", describe_engine(engine))
    answering = Answering(labeled, labels, engine)
    rows = labeled.manifest.rows
    with room_for_logits(rows * views.count, len(labels)) as room:
        with watching(lambda: answering, rows, console, config.log_interval_seconds):
            notes, judged, answers = answering.run(load, room)
        _logger.info("predicted %d rows; fitting calibration", len(answers))
        found = evaluate_answers(answers, paths, config.target_precision)
    assert config.model is not None
    model = {
        "bundle": redact_uri(config.model),
        "fingerprint": bundle.fingerprint,
        "architecture": str(bundle.config.spec),
        "engine": describe_engine(engine),
    }
    return _Judged(found, notes, judged, model, curves)


def _judge_run(config: EvaluateConfig, labeled: LabeledManifest) -> _Judged:
    assert config.run is not None
    curves = read_curves(config.training_curves, {}, labeled.storage)
    run = open_run(config.run, labeled.storage)
    notes, rows, outcomes, kept = read_answers(run, labeled, labeled.storage)
    paths = _paths(config, outcomes.labels, None)
    found = evaluate_outcomes(outcomes, kept, paths, config.target_precision)
    model = {
        "run": run.record["run_id"],
        "fingerprint": run.record["model"].get("fingerprint"),
        "architecture": run.record["model"].get("architecture"),
    }
    return _Judged(found, notes, rows, model, curves)


def _paths(
    config: EvaluateConfig, labels: Sequence[str], known: Sequence[Path] | None
) -> Sequence[Path] | None:
    if known is None and config.labels_are_paths:
        return [tuple(label.split("/")) for label in labels]
    return known


def _place(config: EvaluateConfig) -> EngineConfig:
    device: Device = "cpu"
    if config.device != "auto":
        device = config.device
    elif config.engine != "openvino" and torch.cuda.is_available():
        device = "cuda"
    return EngineConfig(
        device, torch.get_num_threads(), config.batch_size, CompileCache.from_cache_dir(config.cache_dir)
    )


def _load(
    config: EvaluateConfig, labeled: LabeledManifest, preprocessing: Preprocessing, views: Views
) -> LoadSettings:
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
    config: EvaluateConfig, judged: _Judged, subject: EvaluationSubject, labeled: LabeledManifest
) -> str:
    pairs = worst_pairs(judged.found, judged.rows)
    epochs = judged.curves.get(EPOCH, [])
    parts = PageParts(
        title=f"How right is {redact_uri(config.model or config.run or '')}",
        manifest=redact_uri(config.manifest),
        version=version("batchcls"),
        pairs=pairs,
        images=thumbnails(pairs, labeled, _load(config, labeled, _ANY_SIZE, Views())),
        curves=[
            Curve(name.replace("_", " "), epochs, values)
            for name, values in judged.curves.items()
            if name != EPOCH
        ],
    )
    return evaluate_page(judged.found, subject, parts)


def _write_bundle(
    uri: str, bundle: Bundle, calibration: Calibration, paths: Sequence[Path] | None, storage: Storage
) -> str:
    """The same network with what was found; its golden answers stay, which are of temperature 1."""
    changes: dict[str, Any] = {"calibration": calibration}
    if bundle.config.category_paths is None and paths is not None:
        changes["category_paths"] = paths
    record = bundle.config.model_dump() | changes
    calibrated = Bundle(type(bundle.config).model_validate(record), bundle.weights)
    calibrated.save(uri, storage)
    _logger.info("calibrated bundle %s: fingerprint %s", redact_uri(uri), calibrated.fingerprint[:12])
    return uri


def _show(found: Evaluated, subject: EvaluationSubject, written: Sequence[str]) -> None:
    """The closing words, on stdout."""
    out = results_console()
    out.print(metrics_table(found))
    out.print(worst_categories_table(found, _CATEGORIES_SHOWN))
    for sentence in verdict(found):
        out.print(sentence)
    for reason, count in subject.left_out.most_common():
        out.print(f"left out: {reason} {count}")
    for line in approximations(found):
        out.print(f"note: {line}")
    for uri in written:
        out.print(f"results: {redact_uri(uri)}")


COMMANDS = (Command("evaluate", EvaluateConfig, evaluate, _EXAMPLES),)

if __name__ == "__main__":
    main("evaluate", COMMANDS)
