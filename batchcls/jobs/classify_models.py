"""The models of a run of the classify job: one, or the small and the large one of a cascade."""

import logging
from dataclasses import dataclass

from batchcls.cli.tables import bundle_line
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.inference.abstention import Abstention
from batchcls.models.cascade_record import CascadeThresholds, label_difference
from batchcls.models.classifier_head import ClassifierHead, ModelLayers, layers_of
from batchcls.models.label_map import LabelMap, read_label_map
from batchcls.models.mapped_classes import MappedClasses
from batchcls.models.model_bundle import Bundle, BundleConfig, sha256_hex
from batchcls.models.model_spec import ModelChoices
from batchcls.models.resolve import check_model, parse_model_arguments, resolve_model
from batchcls.preprocessing import Views, views_of
from batchcls.storage.filesystem import Storage, redact_uri

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """The bundle of a run, and that of the large network if it uses a cascade."""

    bundle: Bundle
    large: Bundle | None = None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the bundle, or of both bundles of a cascade."""
        if self.large is None:
            return self.bundle.fingerprint
        return sha256_hex(f"cascade {self.bundle.fingerprint} {self.large.fingerprint}".encode())

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """One bundle, or the small and the large one of a cascade."""
        return (self.bundle,) if self.large is None else (self.bundle, self.large)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A network of a run.

    Attributes:
        bundle: the model.
        mapped: its classes after the label map.
        layers: fingerprints of its parts.
        views: views of an image in its preprocessing.
    """

    bundle: Bundle
    mapped: MappedClasses
    layers: ModelLayers
    views: Views

    @classmethod
    def of(cls, config: ClassifyConfig, bundle: Bundle, label_map: LabelMap | None) -> "PreparedModel":
        """Apply the settings of a run to a bundle. Raises InputError if they do not match it."""
        mapped = MappedClasses.of(bundle.config, label_map)
        return cls(
            bundle, mapped, layers_of(bundle, mapped), views_of(config.tta, bundle.config.preprocessing)
        )

    @property
    def head(self) -> ClassifierHead | None:
        """Its classifier; None if it is not one linear layer on the embedding."""
        return ClassifierHead.of(self.bundle)


@dataclass(frozen=True, slots=True)
class PreparedCascade:
    """The large network of a cascade.

    Attributes:
        model: the network.
        thresholds: confidences of the small network below which it predicts.
        expected_fraction: share of the rows that it is expected to predict; None without an estimate.
    """

    model: PreparedModel
    thresholds: CascadeThresholds
    expected_fraction: float | None

    def thresholds_of(self, small: MappedClasses) -> tuple[float, ...]:
        """The threshold of each class of the small network after the label map.

        A merged class has the highest threshold of its classes, as with `--abstain`.
        """
        if small.label_map is None:
            return self.thresholds.of(small.config.labels)
        highest = dict.fromkeys(small.config.labels, 0.0)
        labels = self.model.bundle.config.labels
        for label, threshold in zip(labels, self.thresholds.of(labels), strict=True):
            target = small.label_map.unsplit(label)
            if target is not None:
                highest[target] = max(highest[target], threshold)
        return tuple(highest[label] for label in small.config.labels)


def check_models(config: ClassifyConfig, label_map: LabelMap | None, storage: Storage) -> None:
    """Check within seconds, without PyTorch, that the models exist and match each other and the settings.

    Raises:
        InputError: they do not; the message names the remedy.
    """
    records = [_check_model(config, model, storage) for model in config.models]
    for model, record in zip(config.models, records, strict=True):
        if record is not None:
            mapped = MappedClasses.of(record, label_map)
            if config.abstain:
                Abstention.from_bundle(mapped.config)
            _require_views(config, model, record)
        elif config.cascade is not None:
            raise InputError(
                f"--cascade: {model} is the name of an architecture; create a bundle with `batchcls bundle create`"
            )
        elif config.abstain:
            raise InputError(
                "--abstain: an architecture has no thresholds; use a bundle that `evaluate` has calibrated"
            )
    if config.cascade is not None:
        small, large = (record for record in records if record is not None)
        _require_same_labels(config, small, large)
        _thresholds(config, small, large.fingerprint)


def _check_model(config: ClassifyConfig, model: str, storage: Storage) -> BundleConfig | None:
    try:
        return check_model(model, _model_choices(config), storage)
    except InputError as error:
        if config.cascade is None and "," in model:
            raise InputError(f"{error}; --model SMALL,LARGE also takes --cascade auto") from None
        raise


def open_models(config: ClassifyConfig, storage: Storage) -> OpenedModels:
    """Open the models of a run, after `check_models`.

    Raises:
        InputError: a model cannot be read or does not match the settings.
    """
    opened = OpenedModels(*(_open_bundle(config, model, storage) for model in config.models))
    expected = config.model_fingerprint
    if expected is not None and not opened.fingerprint.startswith(expected):
        raise InputError(
            f"--model-fingerprint {expected}: {','.join(map(redact_uri, config.models))} has the fingerprint "
            f"{opened.fingerprint}, so it is not the model that this job is pinned to"
        )
    if opened.large is not None:
        _logger.info("cascade: fingerprint %s", opened.fingerprint)
    return opened


def _open_bundle(config: ClassifyConfig, model: str, storage: Storage) -> Bundle:
    bundle = resolve_model(model, _model_choices(config), storage)
    if bundle.config.golden is None:
        # Only a bundle that was just created from a name lacks them, and torch is imported for that anyway.
        from batchcls.inference.golden_record import with_golden  # noqa: PLC0415

        bundle = with_golden(bundle)
    _logger.info("model: %s", bundle_line(bundle))
    return bundle


def prepare_cascade(
    config: ClassifyConfig, models: OpenedModels, label_map: LabelMap | None
) -> PreparedCascade | None:
    """Apply the settings of a run to the large network of its cascade; None without one.

    Raises:
        InputError: the models do not match each other or the settings.
    """
    if models.large is None:
        return None
    small = models.bundle.config
    _require_same_labels(config, small, models.large.config)
    thresholds = _thresholds(config, small, models.large.fingerprint)
    expected = small.cascade.large_fraction if small.cascade and config.cascade == "auto" else None
    return PreparedCascade(PreparedModel.of(config, models.large, label_map), thresholds, expected)


def read_map(config: ClassifyConfig, storage: Storage) -> LabelMap | None:
    """The map of `--label-map`. Raises InputError if it cannot be read or contradicts itself."""
    return None if config.label_map is None else read_label_map(config.label_map, storage)


def _require_same_labels(config: ClassifyConfig, small: BundleConfig, large: BundleConfig) -> None:
    difference = label_difference(small.labels, large.labels)
    if difference is not None:
        names = " and ".join(map(redact_uri, config.models))
        raise InputError(
            f"--cascade: {names} do not have the same labels: {difference}; train both on the same categories"
        )


def _thresholds(config: ClassifyConfig, small: BundleConfig, large: str) -> CascadeThresholds:
    """The thresholds of `--cascade`; `large` is the fingerprint of the large bundle.

    Raises:
        InputError: the small bundle has none for these models and settings.
    """
    if isinstance(config.cascade, float):
        return CascadeThresholds(default=config.cascade)
    name, record = redact_uri(config.models[0]), small.cascade
    remedy = (
        "fit them with `batchcls evaluate --model SMALL,LARGE --cascade --manifest LABELED --write-bundle NEW_SMALL`, "
        "and classify with NEW_SMALL, or give one confidence for all categories, as in --cascade 0.9"
    )
    if record is None:
        raise InputError(f"--cascade auto: {name} has no thresholds of a cascade; {remedy}")
    if record.large != large:
        raise InputError(
            f"--cascade auto: the thresholds in {name} were fitted for the large model {record.large[:12]}, and "
            f"{redact_uri(config.models[1])} is {large[:12]}; {remedy}"
        )
    if record.small != small.model_copy(update={"cascade": None}).fingerprint:
        raise InputError(f"--cascade auto: {name} was changed after its thresholds were fitted; {remedy}")
    if record.tta != config.tta:
        raise InputError(
            f"--cascade auto: the thresholds in {name} were fitted with --tta {record.tta} and do not hold for --tta "
            f"{config.tta}; {remedy}"
        )
    return record.thresholds


def _model_choices(config: ClassifyConfig) -> ModelChoices:
    return ModelChoices(
        weights=config.weights,
        labels=config.labels,
        arguments=parse_model_arguments(config.model_args or ""),
        tap=config.embedding_tap,
        allow_random=config.allow_random_weights,
    )


def _require_views(config: ClassifyConfig, model: str, bundle: BundleConfig) -> None:
    """Temperature and thresholds are fitted to averages over certain views and do not hold for others."""
    calibration = bundle.calibration
    if calibration is None or calibration.tta == config.tta:
        return
    message = (
        f"--tta {config.tta}: {redact_uri(model)} was calibrated with --tta {calibration.tta}; classify with "
        f"that, or calibrate it again with `batchcls evaluate --tta {config.tta} --write-bundle BUNDLE`"
    )
    if config.abstain:
        raise InputError(f"{message}; its thresholds do not hold for other views")
    _logger.warning("%s; probabilities may be less well calibrated", message)
