"""The work of `batchcls evaluate --cascade`: fits the thresholds of a cascade and compares it with its networks."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from batchcls.cli.console import results_console, show_progress
from batchcls.cli.evaluation_tables import cascade_findings, cascade_table
from batchcls.cli.tables import bundle_line
from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.errors import ExitCode, InputError, stop_run_on_input_error
from batchcls.evaluation.cascade_evaluation import CascadeEvaluation, CascadeNetwork, CascadeResult
from batchcls.evaluation.classification_metrics import Outcomes, Rows
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.evaluation.model_predictions import LabeledPredictor, allocate_logits
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.throughput import measure_throughput
from batchcls.jobs.evaluate_run import engine_config, load_settings, read_labeled
from batchcls.manifest.snapshot import Manifest
from batchcls.models.cascade_record import CascadeRecord
from batchcls.models.engines.engine import Engine, EngineChoice
from batchcls.models.engines.factory import describe_engine
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import views_of
from batchcls.storage.filesystem import Storage, redact_uri, write_files

_logger = logging.getLogger("batchcls.jobs.evaluate")

_MIN_ROWS = 10
_TIMED_WINDOWS = 3
_WINDOW_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _PredictedRows:
    """The predictions of one network.

    Attributes:
        uri, bundle, engine: of the network.
        notes: table of all rows with the schema `labeled_rows.NOTES`.
        rows: row numbers of the predicted rows, ascending.
        outcomes: their predictions at the temperature of the bundle, as in `classify`.
        pixels: the first batch.
        views: forward passes per image.
    """

    uri: str
    bundle: Bundle
    engine: Engine
    notes: pa.Table
    rows: Rows
    outcomes: Outcomes
    pixels: npt.NDArray[np.uint8]
    views: int

    def of_rows(self, rows: Rows) -> Outcomes:
        """The outcomes of some of the rows."""
        return self.outcomes.take(np.searchsorted(self.rows, rows))


def evaluate(config: EvaluateConfig, manifest: Manifest, console: Console) -> ExitCode:
    """Fit and evaluate the cascade and write all outputs. Raises `BatchclsError` on expected errors.

    Args:
        config: settings of the command.
        manifest: the opened manifest, from `input_check.check_evaluate`.
        console: console that shows the progress.
    """
    storage = Storage(config.storage_options)
    bundles = [Bundle.load(uri, storage) for uri in config.models]
    labeled = read_labeled(config, manifest, storage)
    small, large = (
        _predict(config, redact_uri(uri), bundle, labeled, console)
        for uri, bundle in zip(config.models, bundles, strict=True)
    )
    # An image that only one of the networks received, because its store failed for a moment, is excluded.
    rows = np.intersect1d(small.rows, large.rows)
    if len(rows) < _MIN_ROWS:
        raise InputError(
            f"only {len(rows)} row(s) can be evaluated; thresholds are fitted on one half of the rows and evaluated on "
            "the other, which takes hundreds of rows: use a larger labeled manifest"
        )
    result = CascadeResult.of(
        small.of_rows(rows), large.of_rows(rows), config.max_accuracy_loss, config.accuracy_loss_confidence
    )
    found = _evaluation(config, labeled, result, (small, large), len(rows))
    notes = small.notes.set_column(small.notes.column_names.index("reason"), "reason", _reasons(small, large))
    files = {
        "predictions.parquet": _parquet(result.predictions(notes, rows)),
        "cascade.json": found.to_json(),
    }
    written = write_files(config.output, files, storage)
    if config.write_bundle is not None:
        with stop_run_on_input_error():
            written.append(_write_bundle(config, small.bundle, found, storage))
    _print_results(found, written)
    return ExitCode.DONE


def _predict(
    config: EvaluateConfig, uri: str, bundle: Bundle, labeled: LabeledManifest, console: Console
) -> _PredictedRows:
    """Predict the labeled rows with one network."""
    _logger.info("model: %s", bundle_line(bundle))
    views = views_of(config.tta, bundle.config.preprocessing)
    load = load_settings(config, labeled, bundle.config.preprocessing, views)
    engine, _ = start_tested_engine(
        bundle, EngineChoice(config.engine, config.precision), engine_config(config)
    )
    labels, calibration, rows = bundle.config.labels, bundle.config.calibration, labeled.manifest.rows
    predictor = LabeledPredictor(labeled, labels, engine)
    with (
        allocate_logits(rows * views.count, len(labels)) as buffer,
        show_progress(lambda: predictor, rows, console, config.log_interval_seconds),
    ):
        notes, predicted, store = predictor.run(load, buffer)
        outcomes = store.outcomes(1.0 if calibration is None else calibration.temperature)
    assert predictor.first_batch is not None
    return _PredictedRows(uri, bundle, engine, notes, predicted, outcomes, predictor.first_batch, views.count)


def _reasons(small: _PredictedRows, large: _PredictedRows) -> pa.Array:
    """Why each row of the manifest is excluded; null for evaluated rows."""
    pairs = zip(*(found.notes.column("reason").to_pylist() for found in (small, large)), strict=True)
    return pa.array([first or second for first, second in pairs], pa.string())


def _evaluation(
    config: EvaluateConfig,
    labeled: LabeledManifest,
    result: CascadeResult,
    networks: tuple[_PredictedRows, _PredictedRows],
    rows: int,
) -> CascadeEvaluation:
    seconds = _seconds_per_image(config, networks)
    small, large = (
        CascadeNetwork(
            bundle=network.uri,
            fingerprint=network.bundle.config.model_copy(update={"cascade": None}).fingerprint
            if network is networks[0]
            else network.bundle.fingerprint,
            architecture=str(network.bundle.config.spec),
            engine=describe_engine(network.engine),
            accuracy=float(outcomes.correct.mean()),
            seconds_per_image=time,
        )
        for network, outcomes, time in zip(networks, (result.small, result.large), seconds, strict=True)
    )
    return CascadeEvaluation(
        created=datetime.now(UTC),
        settings=config.redacted(),
        manifest=labeled.manifest.fingerprint or "",
        rows=rows,
        excluded=dict(Counter(_reasons(*networks).drop_null().to_pylist()).most_common()),
        small=small,
        large=large,
        thresholds=result.thresholds,
        accuracy=float(result.correct.mean()),
        large_fraction=float((~result.kept).mean()),
        fitted_large_fraction=result.fitted_large_fraction,
        from_large=result.from_large,
        from_small=result.from_small,
        price_per_hour=config.price_per_hour,
    )


def _seconds_per_image(config: EvaluateConfig, networks: Sequence[_PredictedRows]) -> list[float]:
    """Measure the networks in alternating windows, because the speed of a shared machine changes."""
    windows: list[list[float]] = [[] for _ in networks]
    for _ in range(_TIMED_WINDOWS):
        for network, rates in zip(networks, windows, strict=True):
            found = measure_throughput(network.engine, network.pixels, config.batch_size, _WINDOW_SECONDS)
            rates.append(found.images_per_second)
    return [network.views / float(np.median(rates)) for network, rates in zip(networks, windows, strict=True)]


def _write_bundle(config: EvaluateConfig, small: Bundle, found: CascadeEvaluation, storage: Storage) -> str:
    """Write the small bundle with the thresholds; everything else in it is unchanged."""
    assert config.write_bundle is not None
    record = CascadeRecord(
        small=found.small.fingerprint,
        large=found.large.fingerprint,
        thresholds=found.thresholds,
        max_accuracy_loss=config.max_accuracy_loss,
        confidence=config.accuracy_loss_confidence,
        large_fraction=found.fitted_large_fraction,
        small_accuracy=found.small.accuracy,
        large_accuracy=found.large.accuracy,
        cascade_accuracy=found.accuracy,
        rows=found.rows,
        manifest_fingerprint=found.manifest,
        tta=config.tta,
    )
    bundle = Bundle(small.config.model_copy(update={"cascade": record}), small.weights)
    bundle.save(config.write_bundle, storage)
    _logger.info(
        "small bundle with thresholds %s: fingerprint %s",
        redact_uri(config.write_bundle),
        bundle.fingerprint[:12],
    )
    return config.write_bundle


def _print_results(found: CascadeEvaluation, written: Sequence[str]) -> None:
    out = results_console()
    out.print(cascade_table(found))
    for sentence in cascade_findings(found):
        out.print(sentence)
    for reason, count in found.excluded.items():
        out.print(f"excluded: {count} ({reason})")
    for uri in written:
        out.print(f"results: {redact_uri(uri)}")


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data
