"""Measures all candidates one after the other, reuses stored measurements and records failures."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from batchcls.comparison.benchmark import BenchmarkResult
from batchcls.comparison.candidates import Candidate, check_engines
from batchcls.comparison.recommend import BUSY_CORES
from batchcls.comparison.results import Finished, Results
from batchcls.config.compare_config import CompareConfig
from batchcls.errors import BatchclsError, InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, decode_limits, fetch_policy
from batchcls.manifest.labeled_manifest import open_labeled_manifest
from batchcls.manifest.sample import LABEL, RowSample, take_sample
from batchcls.manifest.snapshot import Manifest
from batchcls.models.engines.engine import REFERENCE
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_names import is_model_name
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import check_model, resolve_model
from batchcls.storage.filesystem import Storage, redact_uri

_logger = logging.getLogger(__name__)

Reference = tuple[int, ...] | None
MeasureOne = Callable[[Candidate, Reference], BenchmarkResult]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A candidate that could not be measured, and why."""

    candidate: Candidate
    error: BatchclsError

    @property
    def reason(self) -> str:
        """Why, in a line."""
        return str(self.error).removeprefix(f"{self.candidate}: ")


def run_campaign(
    candidates: Sequence[Candidate],
    results: Results,
    measure_one: MeasureOne,
    begin: Callable[[Candidate], None],
) -> list[Skipped]:
    """Measure every candidate that `results` does not have yet, and keep each as soon as it is finished.

    Args:
        candidates: those in fp32 before the others of the same bundle, which are compared with them.
        results: what was measured before; is added to.
        measure_one: measures a candidate; is given the best classes of its fp32 reference if known.
        begin: is told of every candidate when its turn comes.

    Returns:
        The candidates that could not be measured; they are tried again by the next run.

    Raises:
        BatchclsError: none of the candidates could be measured, nor was before; the message has the reasons.
    """
    before = sum(results.find(candidate) is not None for candidate in candidates)
    if before:
        _logger.info("resumed: %d of %d measurements reused", before, len(candidates))
    skipped = []
    for number, candidate in enumerate(candidates, start=1):
        begin(candidate)
        finished = results.find(candidate)
        if finished is None:
            try:
                if candidate.pointless is not None:
                    raise InputError(candidate.pointless)
                measured = measure_one(candidate, _reference(candidate, results))
            except BatchclsError as error:
                skipped.append(Skipped(candidate, error))
                _logger.warning("skipped %s: %s", candidate, skipped[-1].reason)
                continue
            finished = results.add(candidate, measured)
            _tell(candidate, finished, f"{number} of {len(candidates)}")
        _warn_if_busy(candidate, finished, results)
    if len(skipped) == len(candidates):
        raise _nothing_measured(skipped)
    return skipped


def _reference(candidate: Candidate, results: Results) -> Reference:
    finished = results.find(replace(candidate, choice=REFERENCE))
    return None if finished is None else finished.answers


def _tell(candidate: Candidate, finished: Finished, place: str) -> None:
    _logger.info("%s (%s)", finished.measurement.summary_line, place)
    for note in finished.notes:
        _logger.info("%s: %s", candidate, note)


def _warn_if_busy(candidate: Candidate, finished: Finished, results: Results) -> None:
    load = finished.measurement.other_load
    if load > BUSY_CORES:
        _logger.warning(
            "%s: other programs used %.1f cores during the measurement, so the results are too low; "
            "stop them, delete %s and run the command again",
            candidate,
            load,
            redact_uri(results.uri_of(candidate)),
        )


def _nothing_measured(skipped: Sequence[Skipped]) -> BatchclsError:
    reasons = "; ".join(f"{entry.candidate}: {entry.reason}" for entry in skipped)
    kind = InputError if all(isinstance(entry.error, InputError) for entry in skipped) else BatchclsError
    return kind(f"no candidate could be measured: {reasons}")


@dataclass(frozen=True, slots=True)
class ComparisonInputs:
    """Everything that the measuring needs; `bundles` by the name that each was given, `engines` as named."""

    storage: Storage
    sample: RowSample
    bundles: Mapping[str, Bundle]
    engines: tuple[str, ...]
    fetch: FetchPolicy
    limits: DecodeLimits


def open_inputs(config: CompareConfig) -> ComparisonInputs:
    """Open the manifest, take the sample and resolve the models.

    Raises:
        InputError: something is missing, unknown or does not fit; the message has the remedy.
    """
    storage = Storage(config.storage_options)
    check_engines(config.engines)
    for model in config.models:
        check_model(model, _choices(config, model), storage)
    manifest = _open_manifest(config, storage)
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


def _open_manifest(config: CompareConfig, storage: Storage) -> Manifest:
    """The manifest, with its labels if it has any; a column that somebody named has to be there."""
    return open_labeled_manifest(
        config.manifest,
        storage,
        config.label_column,
        id_column=config.id_column,
        optional="label_column" not in config.model_fields_set,
    )


def _choices(config: CompareConfig, model: str) -> ModelChoices:
    return ModelChoices(allow_random=config.allow_random_weights and is_model_name(model))


def _resolve(config: CompareConfig, storage: Storage) -> Mapping[str, Bundle]:
    """Every model that was named; of several names for one model the first."""
    bundles: dict[str, Bundle] = {}
    for model in config.models:
        bundle, name = resolve_model(model, _choices(config, model), storage), redact_uri(model)
        same = [known for known, other in bundles.items() if other.fingerprint == bundle.fingerprint]
        if same:
            _logger.warning("%s is the same model as %s and is measured only once", name, same[0])
            continue
        weights = bundle.config.weights
        _logger.info("%s: %s, weights %s %s", name, bundle.config.spec, weights.kind, weights.name)
        bundles[name] = bundle
    return bundles
