"""What a comparison was asked for, opened and checked before anything is measured."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from batchcls.comparison.candidate import check_engines
from batchcls.comparison.sample import Sample, take_sample
from batchcls.config.compare import CompareConfig
from batchcls.images.fetch import FetchPolicy
from batchcls.images.limits import DecodeLimits
from batchcls.images.policies import decode_limits, fetch_policy
from batchcls.manifest import Manifest, open_labelled
from batchcls.models.bundle import Bundle
from batchcls.models.choices import ModelChoices
from batchcls.models.names import is_model_name
from batchcls.models.resolve import check_model, resolve_model
from batchcls.storage import Storage, redact_uri

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that the measuring needs; `bundles` by the name that each was given, `engines` as named."""

    storage: Storage
    sample: Sample
    bundles: Mapping[str, Bundle]
    engines: tuple[str, ...]
    fetch: FetchPolicy
    limits: DecodeLimits


def open_inputs(config: CompareConfig) -> Inputs:
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
    labels = f"labels in {config.label_column}" if manifest.columns.kept else "no labels"
    _logger.info("sample: %d of %d rows, %s", sample.rows.num_rows, manifest.rows, labels)
    return Inputs(
        storage=storage,
        sample=sample,
        bundles=_resolve(config, storage),
        engines=tuple(config.engines),
        fetch=fetch_policy(config),
        limits=decode_limits(config),
    )


def _open_manifest(config: CompareConfig, storage: Storage) -> Manifest:
    """The manifest, with its labels if it has any; a column that somebody named has to be there."""
    return open_labelled(
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
            _logger.warning("%s is the same model as %s and is measured once", name, same[0])
            continue
        weights = bundle.config.weights
        _logger.info("%s: %s, weights %s %s", name, bundle.config.spec, weights.kind, weights.name)
        bundles[name] = bundle
    return bundles
