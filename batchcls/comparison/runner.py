"""Measures all candidates sequentially, reuses stored measurements and records failures."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from batchcls.comparison.benchmark import BenchmarkResult
from batchcls.comparison.candidates import Candidate
from batchcls.comparison.recommend import MAX_OTHER_LOAD
from batchcls.comparison.results import Results, StoredMeasurement
from batchcls.config.compare_config import CompareConfig
from batchcls.errors import BatchclsError, InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, decode_limits, fetch_policy
from batchcls.manifest.sample import LABEL, RowSample, take_sample
from batchcls.manifest.snapshot import Manifest
from batchcls.models.engines.engine import REFERENCE
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_names import is_model_name
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage, redact_uri

_logger = logging.getLogger(__name__)

Reference = tuple[int, ...] | None
MeasureOne = Callable[[Candidate, Reference], BenchmarkResult]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A candidate that could not be measured, with the error."""

    candidate: Candidate
    error: BatchclsError

    @property
    def reason(self) -> str:
        """Reason on one line, without the name of the candidate."""
        return str(self.error).removeprefix(f"{self.candidate}: ")


def measure_candidates(
    candidates: Sequence[Candidate],
    results: Results,
    measure_one: MeasureOne,
    on_start: Callable[[Candidate], None],
) -> list[Skipped]:
    """Measure every candidate without a stored measurement, and store each result immediately.

    Args:
        candidates: Candidates in order. For each bundle, fp32 comes first, because the other engines are
            compared with it.
        results: Stored measurements; new ones are added.
        measure_one: Measures a candidate, given the top-1 classes of its fp32 reference if known.
        on_start: Called with each candidate before it is processed.

    Returns:
        The candidates that could not be measured. The next run tries them again.

    Raises:
        BatchclsError: There is no measurement of any candidate; the message lists the reasons.
    """
    before = sum(results.find(candidate) is not None for candidate in candidates)
    if before:
        _logger.info("resumed: %d of %d measurements reused", before, len(candidates))
    skipped = []
    for number, candidate in enumerate(candidates, start=1):
        on_start(candidate)
        stored = results.find(candidate)
        if stored is None:
            try:
                if candidate.skip_reason is not None:
                    raise InputError(candidate.skip_reason)
                result = measure_one(candidate, _reference(candidate, results))
            except BatchclsError as error:
                skipped.append(Skipped(candidate, error))
                _logger.warning("skipped %s: %s", candidate, skipped[-1].reason)
                continue
            stored = results.add(candidate, result)
            _log_measurement(candidate, stored, f"{number} of {len(candidates)}")
        _warn_about_other_load(candidate, stored, results)
    if len(skipped) == len(candidates):
        raise _no_measurement_error(skipped)
    return skipped


def _reference(candidate: Candidate, results: Results) -> Reference:
    stored = results.find(replace(candidate, choice=REFERENCE))
    return None if stored is None else stored.predictions


def _log_measurement(candidate: Candidate, stored: StoredMeasurement, progress: str) -> None:
    _logger.info("%s (%s)", stored.measurement.summary_line, progress)
    for note in stored.notes:
        _logger.info("%s: %s", candidate, note)


def _warn_about_other_load(candidate: Candidate, stored: StoredMeasurement, results: Results) -> None:
    load = stored.measurement.other_load
    if load > MAX_OTHER_LOAD:
        _logger.warning(
            "%s: other programs used %.1f cores during the measurement, which makes the results unreliable; "
            "stop them, delete %s and run the command again",
            candidate,
            load,
            redact_uri(results.uri_of(candidate)),
        )


def _no_measurement_error(skipped: Sequence[Skipped]) -> BatchclsError:
    reasons = "; ".join(f"{entry.candidate}: {entry.reason}" for entry in skipped)
    error_type = (
        InputError if all(isinstance(entry.error, InputError) for entry in skipped) else BatchclsError
    )
    return error_type(f"no candidate could be measured: {reasons}")


@dataclass(frozen=True, slots=True)
class ComparisonInputs:
    """Inputs of a comparison; `bundles` by name in `--models`, `engines` as passed to `--engines`."""

    storage: Storage
    sample: RowSample
    bundles: Mapping[str, Bundle]
    engines: tuple[str, ...]
    fetch: FetchPolicy
    limits: DecodeLimits


def open_inputs(config: CompareConfig, manifest: Manifest) -> ComparisonInputs:
    """Draw the sample from the manifest and resolve the models.

    Raises:
        InputError: The manifest cannot be read, or a model is invalid; the message states the remedy.
    """
    storage = Storage(config.storage_options)
    sample = take_sample(manifest, config.images, storage)
    _logger.info(
        "sample: %d of %d rows, %s", sample.rows.num_rows, manifest.rows, _describe_labels(sample, config)
    )
    return ComparisonInputs(
        storage=storage,
        sample=sample,
        bundles=_resolve(config, storage),
        engines=tuple(config.engines),
        fetch=fetch_policy(config),
        limits=decode_limits(config),
    )


def _describe_labels(sample: RowSample, config: CompareConfig) -> str:
    if LABEL not in sample.rows.column_names:
        return "no label column"
    labels = sample.rows.column(LABEL)
    return f"{len(labels) - labels.null_count} with a label in column {config.label_column}"


def _choices(config: CompareConfig, model: str) -> ModelChoices:
    return ModelChoices(allow_random=config.allow_random_weights and is_model_name(model))


def _resolve(config: CompareConfig, storage: Storage) -> Mapping[str, Bundle]:
    """Resolve all models by name; duplicates are dropped."""
    bundles: dict[str, Bundle] = {}
    for model in config.models:
        bundle, name = resolve_model(model, _choices(config, model), storage), redact_uri(model)
        duplicates = [known for known, other in bundles.items() if other.fingerprint == bundle.fingerprint]
        if duplicates:
            _logger.warning("%s is the same model as %s and is measured only once", name, duplicates[0])
            continue
        weights = bundle.config.weights
        _logger.info("%s: %s, weights %s", name, bundle.config.spec, weights)
        bundles[name] = bundle
    return bundles
