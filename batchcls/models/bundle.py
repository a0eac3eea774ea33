"""A model as a folder: `bundle.json` says what it is, `model.safetensors` holds its weights.

`bundle.json` names the digest of the weights and is written last, so a folder whose two files do
not belong together is found out when it is read. The fingerprint covers both files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.labels import check_labels
from batchcls.models.library import ArgumentValue, ModelSpec, SourceName
from batchcls.models.sources import find_model, library_of
from batchcls.models.weights import from_safetensors, load_strictly, sha256_hex
from batchcls.preprocessing import Preprocessing
from batchcls.storage import Storage, error_code, explain, join, redact_uri

CONFIG_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1

OriginKind = Literal["file", "pretrained", "trained", "random"]


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

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = Field(default=1, description="Version of this record.")
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
    embedding_tap: Literal["pooled"] = Field(
        default="pooled", description="Where the embedding is taken: pooled, in front of the classifier."
    )
    embedding_dimension: int = Field(gt=0, description="Values in an embedding.")
    weights: WeightsOrigin = Field(description="Where the weights come from.")
    lineage: dict[str, Any] = Field(
        default_factory=dict, description="What is known of how it was made; JSON values."
    )

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        check_labels(self.labels, CONFIG_FILE)
        if self.category_paths is not None and len(self.category_paths) != len(self.labels):
            raise ValueError(
                f"category_paths has {len(self.category_paths)} entries for {len(self.labels)} labels"
            )
        return self

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return ModelSpec(self.source, self.architecture, self.arguments)


@dataclass(frozen=True)
class Bundle:
    """A model, complete: its record and the bytes of its safetensors file, which belong together."""

    config: BundleConfig
    weights: bytes = field(repr=False)

    def __post_init__(self) -> None:
        found = sha256_hex(self.weights)
        if found != self.config.weights.sha256:
            raise InputError(
                f"{WEIGHTS_FILE} is not the file that {CONFIG_FILE} describes: sha256 is {found} and should "
                f"be {self.config.weights.sha256}; copy the bundle again or create it anew"
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the record, which holds the weights' digest; the same on every machine."""
        record = self.config.model_dump(mode="json")
        return sha256_hex(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())

    @property
    def publishable(self) -> bool:
        """False for random weights."""
        return self.config.weights.kind != "random"

    @classmethod
    def load(cls, uri: str, storage: Storage) -> "Bundle":
        """Read a bundle folder.

        Raises:
            InputError: there is no bundle, or it is damaged, mixed from two, or of another version.
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
        config = _parse_config(record, redact_uri(record_uri))
        weights_uri = join(uri, WEIGHTS_FILE)
        with explain(weights_uri):
            return cls(config, storage.read_bytes(weights_uri))

    def save(self, uri: str, storage: Storage) -> None:
        """Write the folder, `bundle.json` last; a bundle that is there already is replaced.

        Raises:
            InputError: the place cannot be written to.
        """
        text = json.dumps(self.config.model_dump(mode="json"), indent=2, ensure_ascii=False)
        for name, data in ((WEIGHTS_FILE, self.weights), (CONFIG_FILE, f"{text}\n".encode())):
            with explain(join(uri, name)):
                storage.write_whole(join(uri, name), data)


def build_backbone(bundle: Bundle) -> Backbone:
    """The bundle's network with its weights, cut into logits and embedding, in evaluation mode.

    Raises:
        InputError: the library does not know the architecture (any more), or weights, labels or
            embedding do not fit it.
    """
    config = bundle.config
    spec = find_model(f"{config.source}:{config.architecture}", config.arguments)
    library = library_of(spec)
    model = library.build(spec, len(config.labels))
    load_strictly(model, from_safetensors(bundle.weights, WEIGHTS_FILE), WEIGHTS_FILE)
    size = (config.preprocessing.input_height, config.preprocessing.input_width)
    backbone = Backbone(model, library.classifiers(model), size)
    if backbone.dimension != config.embedding_dimension:
        raise InputError(
            f"the embedding of {spec} has {backbone.dimension} values, {CONFIG_FILE} says "
            f"{config.embedding_dimension}; create the bundle anew"
        )
    return backbone


def _parse_config(data: bytes, name: str) -> BundleConfig:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise InputError(f"{name} is damaged ({error}); copy the bundle again or create it anew") from error
    version = record.get("format_version") if isinstance(record, Mapping) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name} is of format {version!r}, this program reads {FORMAT_VERSION}; create the bundle anew"
        )
    try:
        return BundleConfig.model_validate_json(data)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'record'}: {item['msg']}" for item in error.errors()
        )
        raise InputError(f"{name} does not hold together: {problems}; create the bundle anew") from error
