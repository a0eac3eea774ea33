"""A model as a folder: `bundle.json` describes it, and `model.safetensors` contains its weights.

`bundle.json` contains the digest of the weights and is written last, so a reader detects two files that do not belong
together. The fingerprint covers both files. Reading a bundle does not require torch; `batchcls.models.build` builds its
network.
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
from batchcls.models.cascade_record import CascadeRecord
from batchcls.models.golden import Golden
from batchcls.models.labels import CategoryPaths, check_labels, labels_digest
from batchcls.models.model_spec import ArgumentValue, ModelSpec, SourceName
from batchcls.preprocessing import AugmentationName, Preprocessing
from batchcls.storage.filesystem import Storage, error_code, explain, join, redact_uri, write_files
from batchcls.storage.missing_paths import missing_path_message

_Share = Annotated[float, Field(ge=0, le=1)]


class HeldOut(BaseModel):
    """Cross-validated results of the thresholds: each row is evaluated with thresholds of the other rows."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int = Field(ge=1, description="Labeled rows.")
    precision: _Share | None = Field(
        description="Share of the accepted predictions that are correct; None: none was accepted."
    )
    coverage: _Share = Field(description="Share of the rows whose prediction was accepted.")


class Calibration(BaseModel):
    """A temperature and thresholds, and the rows on which they were fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(
        gt=0, description="Logits are divided by it before softmax; golden outputs have temperature 1."
    )
    ece_before: _Share = Field(description="Expected calibration error of the labeled rows at temperature 1.")
    ece_after: _Share = Field(
        description="The same at cross-fitted temperatures: each half of the rows with the temperature of the other."
    )
    target_precision: _Share = Field(description="Share of accepted predictions that should be correct.")
    thresholds: tuple[_Share | None, ...] = Field(
        description="For each label, the smallest probability of an accepted prediction; None: none is accepted."
    )
    depth_thresholds: tuple[_Share | None, ...] | None = Field(
        default=None,
        description="For each depth of the category paths, from the root, the smallest probability of a node.",
    )
    held_out: HeldOut = Field(description="Results of the thresholds on held-out rows.")
    rows: int = Field(ge=1, description="Number of labeled rows on which the calibration was fitted.")
    manifest_fingerprint: str = Field(description="Fingerprint of the manifest with these rows.")
    tta: AugmentationName = Field(
        default="none",
        description="Test-time augmentation of the rows; the thresholds are not valid for other augmentation.",
    )


CONFIG_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 2

OriginKind = Literal["file", "pretrained", "trained", "random"]


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of a file's bytes, in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class WeightsOrigin(BaseModel):
    """Provenance of a bundle's weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: OriginKind = Field(
        description="file: a user's file; pretrained: published by the library; trained: by batchcls; random: for "
        "load tests, never published."
    )
    name: str = Field(description="File name, library tag, or name of the training run.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description=f"Digest of {WEIGHTS_FILE}.")

    def __str__(self) -> str:
        """Return kind and name, such as `file shop.safetensors`; once if both are `random`."""
        return self.kind if self.name == self.kind else f"{self.kind} {self.name}"


class BundleConfig(BaseModel):
    """The contents of `bundle.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[2] = Field(default=2, description="Version of this record.")
    source: SourceName = Field(description="Library of the architecture.")
    architecture: str = Field(description="Name in the library, with a tag if there is one.")
    arguments: dict[str, ArgumentValue] = Field(
        default_factory=dict, description="Arguments of the architecture."
    )
    labels: tuple[str, ...] = Field(description="Class names, in the order of the class indices.")
    category_paths: tuple[tuple[str, ...], ...] | None = Field(
        default=None, description="For each label, its path in the category tree."
    )
    preprocessing: Preprocessing = Field(description="Preprocessing of the images.")
    embedding_tap: str = Field(
        default="pooled",
        pattern=TAP_PATTERN,
        description="Where the embedding is taken: pooled, the input of the classifier, or stageN, the spatial mean "
        "of the feature map of the N-th stage.",
    )
    embedding_dimension: int = Field(gt=0, description="Number of values of an embedding.")
    weights: WeightsOrigin = Field(description="Provenance of the weights.")
    untrained_head: bool = Field(
        default=False, description="The classifier is new and untrained; such a bundle is never published."
    )
    dropout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Dropout probability in front of the classifier in later training.",
    )
    trainable: tuple[str, ...] = Field(
        default=("*",),
        min_length=1,
        description="Parameters that later training changes, as glob patterns over their names.",
    )
    head_tensors: tuple[str, ...] | None = Field(
        default=None,
        max_length=2,
        description="Names of the weight and the bias of the classifier; empty: it is not one linear layer on the "
        "pooled embedding. None: the bundle is from a version that did not record it.",
    )
    golden: Golden | None = Field(
        default=None, description="Golden outputs of the network; None until they are computed."
    )
    calibration: Calibration | None = Field(
        default=None, description="Temperature and thresholds; None until the bundle is evaluated."
    )
    cascade: CascadeRecord | None = Field(
        default=None,
        description="Thresholds of a cascade whose small network this is; None unless they were fitted.",
    )
    lineage: dict[str, Any] = Field(
        default_factory=dict, description="Record of how the bundle was created; JSON values."
    )

    @field_validator("lineage")
    @classmethod
    def _lineage_is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        cleaned: dict[str, Any] = _replace_non_finite(value)
        return cleaned

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        check_labels(self.labels, CONFIG_FILE)
        if self.category_paths is not None and len(self.category_paths) != len(self.labels):
            raise ValueError(
                f"category_paths has {len(self.category_paths)} entries for {len(self.labels)} labels"
            )
        if self.calibration is not None:
            self._check_calibration(self.calibration)
        if self.golden is not None and self.golden.labels_sha256 != labels_digest(self.labels):
            raise ValueError("the labels or their order differ from those of the golden outputs")
        return self

    def _check_calibration(self, calibration: Calibration) -> None:
        if len(calibration.thresholds) != len(self.labels):
            raise ValueError(
                f"calibration has {len(calibration.thresholds)} thresholds for {len(self.labels)} labels"
            )
        depth = max(map(len, self.category_paths)) if self.category_paths else 0
        if calibration.depth_thresholds is not None and len(calibration.depth_thresholds) != depth:
            raise ValueError(
                f"calibration has thresholds for {len(calibration.depth_thresholds)} depths, but the category paths "
                f"have {depth}"
            )

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON values.

        The fields `calibration`, `cascade` and `head_tensors` are omitted if they are None, so that older bundles
        without them keep their fingerprints.
        """
        added = {
            "calibration": self.calibration,
            "cascade": self.cascade,
            "head_tensors": self.head_tensors,
        }
        return self.model_dump(mode="json", exclude={name for name, value in added.items() if value is None})

    def category_paths_for(self, labels: Sequence[str]) -> CategoryPaths | None:
        """Look up the category paths of labels by name; None unless every label has one."""
        if self.category_paths is None:
            return None
        paths = dict(zip(self.labels, self.category_paths, strict=True))
        return tuple(paths[label] for label in labels) if paths.keys() >= set(labels) else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the record, which contains the digest of the weights; the same on every machine."""
        return sha256_hex(json.dumps(self.as_json(), sort_keys=True, separators=(",", ":")).encode())

    @property
    def spec(self) -> ModelSpec:
        """The specification of the architecture."""
        return ModelSpec(self.source, self.architecture, self.arguments)

    def require_golden(self, version: int) -> Golden:
        """Return the golden outputs.

        Args:
            version: version of the golden images.

        Raises:
            GoldenMismatch: there are no golden outputs, or they are for another version of the images.
        """
        if self.golden is None or self.golden.drawing != version:
            raise GoldenMismatch(
                f"{CONFIG_FILE} has no golden outputs for this version of batchcls; create the bundle again"
            )
        return self.golden


@dataclass(frozen=True)
class Bundle:
    """A complete model: its record, and the bytes of its safetensors file."""

    config: BundleConfig
    weights: bytes = field(repr=False)

    def __post_init__(self) -> None:
        self._check_weights()

    def verify(self, fingerprint: str) -> None:
        """Verify the fingerprint and the digest of the weights again, after a transfer.

        Raises:
            InputError: the bundle does not have this fingerprint.
        """
        self._check_weights()
        # Computed again, because the cached property was transferred with the object.
        actual = self.config.fingerprint
        if actual != fingerprint:
            raise InputError(
                f"the bundle's fingerprint is {actual} and should be {fingerprint}; this is another model"
            )

    def _check_weights(self) -> None:
        actual = sha256_hex(self.weights)
        if actual != self.config.weights.sha256:
            raise InputError(
                f"{WEIGHTS_FILE} is not the file that {CONFIG_FILE} describes: its sha256 is {actual} and should "
                f"be {self.config.weights.sha256}; copy the bundle again or create it again"
            )

    @cached_property
    def fingerprint(self) -> str:
        """`BundleConfig.fingerprint`."""
        return self.config.fingerprint

    @property
    def publishable(self) -> bool:
        """Whether runs with this bundle may be published: False for random weights and untrained classifiers."""
        return self.config.weights.kind != "random" and not self.config.untrained_head

    @classmethod
    def load(cls, uri: str, storage: Storage) -> "Bundle":
        """Read a bundle folder.

        Raises:
            InputError: there is no bundle, it is damaged, its files do not belong together, or it has another format
                version.
        """
        config = cls.read_config(uri, storage)
        weights_uri = join(uri, WEIGHTS_FILE)
        with explain(weights_uri):
            return cls(config, storage.read_bytes(weights_uri))

    @staticmethod
    def read_config(uri: str, storage: Storage) -> BundleConfig:
        """Read the record of a bundle folder without its weights.

        Raises:
            InputError: there is no bundle, or its record is damaged or has another format version.
        """
        record_uri = join(uri, CONFIG_FILE)
        with explain(record_uri):
            try:
                record = storage.read_bytes(record_uri)
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                missing = missing_path_message(uri, storage)
                if missing is not None:
                    raise InputError(
                        f"{missing}; --model is a folder created by `batchcls bundle create`, timm:NAME "
                        "or torchvision:NAME"
                    ) from None
                raise InputError(
                    f"{redact_uri(uri)} is not a bundle: it contains no {CONFIG_FILE}; --model is a folder created "
                    "by `batchcls bundle create`, timm:NAME or torchvision:NAME"
                ) from None
        return _parse_config(record, redact_uri(record_uri))

    def with_weights(
        self, weights: bytes, origin: Mapping[str, str] | None = None, **changes: Any
    ) -> "Bundle":
        """Return the bundle with other weights.

        Golden outputs, calibration and cascade, which belong to the old weights, are removed unless `changes` contains
        new ones. Category paths are looked up by label; they are removed unless every new label has one.

        Args:
            weights: bytes of a safetensors file.
            origin: new kind and name of the weights. None: those of the old weights.
            changes: new values of other fields of the record.

        Raises:
            InputError: the record is inconsistent with these changes.
        """
        config = self.config
        record = config.weights.model_copy(update={**(origin or {}), "sha256": sha256_hex(weights)})
        labels = changes.get("labels", config.labels)
        derived = {
            "golden": None,
            "calibration": None,
            "cascade": None,
            "category_paths": config.category_paths_for(labels),
        }
        values = config.model_dump() | {"weights": record.model_dump()} | derived | changes
        return Bundle(_validated(lambda: BundleConfig.model_validate(values), "the changed bundle"), weights)

    def round_trip(self) -> "Bundle":
        """Return the bundle as `load` would read it after `save`.

        Raises:
            InputError: `load` would reject the files.
        """
        return Bundle(_parse_config(self._record(), CONFIG_FILE), self.weights)

    def save(self, uri: str, storage: Storage) -> None:
        """Write the folder, with `bundle.json` last; an existing bundle is replaced.

        Raises:
            InputError: the folder cannot be written to, or `load` would reject the files; nothing is written then.
            StorageStoppedError: the weights were written, but `bundle.json` could not be.
        """
        self.round_trip()
        write_files(uri, {WEIGHTS_FILE: self.weights, CONFIG_FILE: self._record()}, storage)

    def _record(self) -> bytes:
        return f"{json.dumps(self.config.as_json(), indent=2, ensure_ascii=False)}\n".encode()


def _replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, which a loss may be but JSON does not support, by None."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _parse_config(data: bytes, name: str) -> BundleConfig:
    try:
        record = json.loads(data, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({error}); copy the bundle again or create it again") from error
    version = record.get("format_version") if isinstance(record, Mapping) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name} has format version {version!r}, but this version of batchcls reads {FORMAT_VERSION}; create the "
            "bundle again"
        )
    return _validated(lambda: BundleConfig.model_validate_json(data), name)


def _validated(parse: Callable[[], BundleConfig], name: str) -> BundleConfig:
    try:
        return parse()
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors()
        )
        raise InputError(f"{name} is not valid: {problems}; create the bundle again") from error
