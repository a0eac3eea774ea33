"""A model as a folder: `bundle.json` says what it is, `model.safetensors` holds its weights.

`bundle.json` names the digest of the weights and is written last, so a folder whose two files do
not belong together is found out when it is read. The fingerprint covers both files. Reading one needs
no torch; `batchcls.models.build` makes a network of it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from batchcls.config.common_config import TAP_PATTERN
from batchcls.errors import GoldenMismatch, InputError
from batchcls.models.golden import Golden
from batchcls.models.labels import CategoryPaths, check_labels, labels_digest
from batchcls.models.model_spec import ArgumentValue, ModelSpec, SourceName
from batchcls.preprocessing import AugmentationName, Preprocessing
from batchcls.storage.filesystem import Storage, error_code, explain, join, redact_uri, write_files

_Share = Annotated[float, Field(ge=0, le=1)]


class HeldOut(BaseModel):
    """What thresholds did on rows that had no part in choosing them; each row was held out once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int = Field(ge=1, description="Labeled rows.")
    precision: _Share | None = Field(
        description="Share of the accepted answers that are right; None: nothing was accepted."
    )
    coverage: _Share = Field(description="Share of the rows whose answer was accepted.")


class Calibration(BaseModel):
    """A temperature and thresholds, and on which rows they were found."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(
        gt=0, description="Logits are divided by it before softmax; golden answers are of temperature 1."
    )
    ece_before: _Share = Field(description="Expected calibration error of the labeled rows at temperature 1.")
    ece_after: _Share = Field(
        description="The same at temperatures that were fitted on other rows: each half with the other's."
    )
    target_precision: _Share = Field(description="Share of accepted answers that should be right.")
    thresholds: tuple[_Share | None, ...] = Field(
        description="For each label the least probability of an accepted answer; None: it is never sure enough."
    )
    depth_thresholds: tuple[_Share | None, ...] | None = Field(
        default=None,
        description="For each depth of the category paths, the top first, the least probability of a node.",
    )
    held_out: HeldOut = Field(description="What such thresholds did on rows that were not used to fit them.")
    rows: int = Field(ge=1, description="Labeled rows that all of this was fitted on.")
    manifest_fingerprint: str = Field(description="Of the manifest with these rows.")
    tta: AugmentationName = Field(
        default="none",
        description="The views that were averaged: probabilities of other views are not what the thresholds are for.",
    )


CONFIG_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 2

OriginKind = Literal["file", "pretrained", "trained", "random"]


def sha256_hex(data: bytes) -> str:
    """Digest of a file's bytes, in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class WeightsOrigin(BaseModel):
    """Where a bundle's weights come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: OriginKind = Field(
        description="file: given by a user; pretrained: published by the library; trained: by this "
        "program; random: for load tests, never published."
    )
    name: str = Field(description="File name, library tag or name of the training run.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description=f"Digest of {WEIGHTS_FILE}.")


class BundleConfig(BaseModel):
    """The contents of `bundle.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[2] = Field(default=2, description="Version of this record.")
    source: SourceName = Field(description="Library that builds the architecture.")
    architecture: str = Field(description="Name in that library, with its tag if it has one.")
    arguments: dict[str, ArgumentValue] = Field(
        default_factory=dict, description="Arguments the architecture is built with."
    )
    labels: tuple[str, ...] = Field(description="Class names; the index is the class index.")
    category_paths: tuple[tuple[str, ...], ...] | None = Field(
        default=None, description="For each label, its path in the shop's tree of categories."
    )
    preprocessing: Preprocessing = Field(description="How an image becomes the network's input.")
    embedding_tap: str = Field(
        default="pooled",
        pattern=TAP_PATTERN,
        description="Where the embedding is taken: pooled, in front of the classifier, or stageN, the mean "
        "over space of the N-th stage's feature map.",
    )
    embedding_dimension: int = Field(gt=0, description="Values in an embedding.")
    weights: WeightsOrigin = Field(description="Where the weights come from.")
    untrained_head: bool = Field(
        default=False, description="The head is new and knows nothing yet: to be trained, never published."
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Dropout in front of the classifier while it is trained further.",
    )
    trainable: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Which parameters training changes, as glob patterns over their names.",
    )
    golden: Golden | None = Field(
        default=None, description="What the network says about a few drawn images; None while it is made."
    )
    calibration: Calibration | None = Field(
        default=None, description="How sure the network may be; None while nobody has evaluated it."
    )
    lineage: dict[str, Any] = Field(
        default_factory=dict, description="What is known of how it was made; JSON values."
    )

    @field_validator("lineage")
    @classmethod
    def _lineage_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        cleaned: dict[str, Any] = _without_non_finite(value)
        return cleaned

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        check_labels(self.labels, CONFIG_FILE)
        if self.category_paths is not None and len(self.category_paths) != len(self.labels):
            raise ValueError(
                f"category_paths has {len(self.category_paths)} entries for {len(self.labels)} labels"
            )
        if self.calibration is not None:
            self._require_fit(self.calibration)
        if self.golden is not None and self.golden.labels_sha256 != labels_digest(self.labels):
            raise ValueError(
                "the labels are not those, or not in the order, that its golden answers were made with"
            )
        return self

    def _require_fit(self, calibration: Calibration) -> None:
        if len(calibration.thresholds) != len(self.labels):
            raise ValueError(
                f"calibration has {len(calibration.thresholds)} thresholds for {len(self.labels)} labels"
            )
        depth = max(map(len, self.category_paths)) if self.category_paths else 0
        if calibration.depth_thresholds is not None and len(calibration.depth_thresholds) != depth:
            raise ValueError(
                f"calibration has thresholds for {len(calibration.depth_thresholds)} depths, the category paths "
                f"have {depth}"
            )

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values. A bundle that was never evaluated keeps the fingerprint it always had."""
        return self.model_dump(mode="json", exclude={"calibration"} if self.calibration is None else None)

    def category_paths_for(self, labels: Sequence[str]) -> CategoryPaths | None:
        """The category paths of other labels, by name; None unless each of them has one here."""
        if self.category_paths is None:
            return None
        known = dict(zip(self.labels, self.category_paths, strict=True))
        return tuple(known[label] for label in labels) if known.keys() >= set(labels) else None

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return ModelSpec(self.source, self.architecture, self.arguments)

    def require_golden(self, drawing: int) -> Golden:
        """The golden answers. Raises GoldenMismatch if there are none, or of other drawings."""
        if self.golden is None or self.golden.drawing != drawing:
            raise GoldenMismatch(
                f"{CONFIG_FILE} has no golden answers that this program can check; create the bundle again"
            )
        return self.golden


@dataclass(frozen=True)
class Bundle:
    """A model, complete: its record and the bytes of its safetensors file, which belong together."""

    config: BundleConfig
    weights: bytes = field(repr=False)

    def __post_init__(self) -> None:
        self._require_weights()

    def verify(self, fingerprint: str) -> None:
        """Hash everything once more, after a transfer.

        Raises:
            InputError: it is not the bundle of that fingerprint.
        """
        self._require_weights()
        # Not the cached property, which has traveled along.
        found = _fingerprint(self.config)
        if found != fingerprint:
            raise InputError(
                f"the bundle's fingerprint is {found} and should be {fingerprint}; this is another model"
            )

    def _require_weights(self) -> None:
        found = sha256_hex(self.weights)
        if found != self.config.weights.sha256:
            raise InputError(
                f"{WEIGHTS_FILE} is not the file that {CONFIG_FILE} describes: sha256 is {found} and should "
                f"be {self.config.weights.sha256}; copy the bundle again or create it again"
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the record, which holds the weights' digest; the same on every machine."""
        return _fingerprint(self.config)

    @property
    def publishable(self) -> bool:
        """False for random weights and for a head that was never trained."""
        return self.config.weights.kind != "random" and not self.config.untrained_head

    @classmethod
    def load(cls, uri: str, storage: Storage) -> "Bundle":
        """Read a bundle folder.

        Raises:
            InputError: there is no bundle, or it is damaged, mixed from two, or of another version.
        """
        config = cls.read_config(uri, storage)
        weights_uri = join(uri, WEIGHTS_FILE)
        with explain(weights_uri):
            return cls(config, storage.read_bytes(weights_uri))

    @staticmethod
    def read_config(uri: str, storage: Storage) -> BundleConfig:
        """Read the record of a bundle folder without its weights.

        Raises:
            InputError: there is no bundle, or its record is damaged or of another version.
        """
        record_uri = join(uri, CONFIG_FILE)
        with explain(record_uri):
            try:
                record = storage.read_bytes(record_uri)
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                raise InputError(
                    f"{redact_uri(uri)} is no bundle: it holds no {CONFIG_FILE}; --model takes a folder made "
                    "by `python -m batchcls.jobs.bundle create`, timm:NAME or torchvision:NAME"
                ) from None
        return _parse_config(record, redact_uri(record_uri))

    def with_weights(
        self, weights: bytes, origin: Mapping[str, str] | None = None, **changes: Any
    ) -> "Bundle":
        """The bundle with other weights, without what was known of the old ones only.

        Golden answers and the calibration are dropped, whatever `changes` says of the rest of the record.
        Labels that differ in number or order take the category paths with them: those of labels that
        remain are kept where every new label has one, and dropped otherwise.

        Args:
            weights: bytes of a safetensors file.
            origin: kind and name of the weights, if they are others'.
            changes: to the record.

        Raises:
            InputError: the record does not hold together with these changes.
        """
        config = self.config
        record = config.weights.model_copy(update={**(origin or {}), "sha256": sha256_hex(weights)})
        labels = changes.get("labels", config.labels)
        kept = {"golden": None, "calibration": None, "category_paths": config.category_paths_for(labels)}
        values = config.model_dump() | {"weights": record.model_dump()} | kept | changes
        return Bundle(_checked(lambda: BundleConfig.model_validate(values), "the changed bundle"), weights)

    def round_trip(self) -> "Bundle":
        """The bundle as a reader of its files will find it.

        Raises:
            InputError: its files would be refused by `load`.
        """
        return Bundle(_parse_config(self._record(), CONFIG_FILE), self.weights)

    def save(self, uri: str, storage: Storage) -> None:
        """Write the folder, `bundle.json` last; a bundle that is there already is replaced.

        Raises:
            InputError: the place cannot be written to, or `load` would refuse what would be written; then
                nothing is.
            StorageStoppedError: the weights are written, and `bundle.json` cannot be.
        """
        self.round_trip()
        write_files(uri, {WEIGHTS_FILE: self.weights, CONFIG_FILE: self._record()}, storage)

    def _record(self) -> bytes:
        return f"{json.dumps(self.config.as_json(), indent=2, ensure_ascii=False)}\n".encode()


def _fingerprint(config: BundleConfig) -> str:
    return sha256_hex(json.dumps(config.as_json(), sort_keys=True, separators=(",", ":")).encode())


def _without_non_finite(value: Any) -> Any:
    """None in place of NaN and infinity, such as a loss may be, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_non_finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _parse_config(data: bytes, name: str) -> BundleConfig:
    try:
        record = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({error}); copy the bundle again or create it again") from error
    version = record.get("format_version") if isinstance(record, Mapping) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name} is of format {version!r}, this program reads {FORMAT_VERSION}; create the bundle again"
        )
    return _checked(lambda: BundleConfig.model_validate_json(data), name)


def _checked(make: Callable[[], BundleConfig], name: str) -> BundleConfig:
    try:
        return make()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors()
        )
        raise InputError(f"{name} does not hold together: {problems}; create the bundle again") from error
