"""Types, base classes and groups of settings that several jobs share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from batchcls.errors import InputError
from batchcls.preprocessing import ChannelMeans, ChannelStds, CropMode, input_sides
from batchcls.schema import RESERVED_COLUMNS
from batchcls.storage.uris import is_remote, local_path, normalize_model, normalize_uri

Auto = Literal["auto"]
AutoOrCount = Auto | Annotated[int, Field(ge=1)]
AutoOrFraction = Auto | Annotated[float, Field(ge=0, le=1)]


def normalized_address(value: str) -> str:
    """Normalize a location. Raises ValueError if it is invalid."""
    return _checked(normalize_uri, value)


def normalized_model(value: str) -> str:
    """Normalize the location of a bundle; the name of an architecture is unchanged. Raises ValueError as above."""
    return _checked(normalize_model, value)


def _local_folder(value: str) -> str:
    if is_remote(value):
        raise ValueError("expected a local folder, not a remote URI")
    return normalized_address(value)


def _node_folder(value: str) -> str:
    _local_folder(value)
    return local_path(value)


def _checked(normalize: Callable[[str], str], value: str) -> str:
    """Normalize a value; errors become ValueError, which pydantic reports with the name of the setting."""
    if not value:
        raise ValueError("is empty; remove the flag or specify a location")
    try:
        return normalize(value)
    except InputError as error:
        raise ValueError(str(error)) from None


def _input_size(value: int | str) -> int | str:
    sides = input_sides(value)
    if not all(_MIN_SIDE <= side <= _MAX_SIDE for side in sides):
        raise ValueError(f"sides must be from {_MIN_SIDE} to {_MAX_SIDE} pixels")
    return value


_MIN_SIDE, _MAX_SIDE = 16, 4096

InputSize = Annotated[int | str, AfterValidator(_input_size)]
"""Size of a network's input in pixels: the side of a square, or HEIGHTxWIDTH."""

Address = Annotated[str, AfterValidator(normalized_address)]
"""A file, folder or glob, local or remote, normalized by `uris.normalize_uri`."""


def split_models(value: str, *, is_cascade: bool) -> list[str]:
    """Return the models in a value of `--model`: one, or SMALL and LARGE of a cascade.

    Raises:
        ValueError: a cascade does not have two models.
    """
    models = value.split(",") if is_cascade else [value]
    if is_cascade and len(models) != 2:
        raise ValueError(f"--cascade takes two models, --model SMALL,LARGE; given: {', '.join(models)}")
    return models


LocalFolder = Annotated[str, AfterValidator(_local_folder)]
"""A local folder, normalized in the same way."""

NodeFolder = Annotated[str, AfterValidator(_node_folder)]
"""A folder on every node; the node resolves `~` and relative paths."""

ModelAddress = Annotated[str, AfterValidator(normalized_model)]
"""A bundle folder, normalized in the same way, or the name of an architecture, unchanged."""

TAP_PATTERN = r"^(pooled|stage[1-9][0-9]*)$"


def _check_column_names(value: list[str]) -> list[str]:
    # Column names are case-insensitive in DuckDB and Spark.
    reserved = sorted(name for name in set(value) if name.casefold() in RESERVED_COLUMNS)
    if reserved:
        raise ValueError(
            f"{', '.join(reserved)}: reserved names of output columns; rename the columns in the manifest"
        )
    if len({name.casefold() for name in value}) != len(value):
        raise ValueError("column names must be unique, ignoring case")
    return value


KeptColumns = Annotated[list[str], AfterValidator(_check_column_names)]
"""Columns of a manifest that pass through to the predictions."""


SettingLayer = Literal["pixels", "embedding", "prediction"]
"""The first result on the way from an image to its prediction that a setting changes."""


@dataclass(frozen=True, slots=True)
class ChangesResults:
    """Marks a setting, in its annotation, that decides which rows and columns a run writes or what they hold.

    The fingerprint of a run and the rule for reusing predictions are derived from these marks.

    Attributes:
        per_image: the prediction for an image depends directly on the setting, so a run reuses only the
            predictions of runs with an equal value. False for settings that select rows and columns, and for those
            whose effect is recorded separately: the precision of the selected engine and the decode margin.
        layer: what is still valid of another run that has another value: nothing if it changes the pixels or the
            embedding; the embedding if it changes only how predictions follow from it.
    """

    per_image: bool = True
    layer: SettingLayer = "pixels"


Marker = dict[str, Any]
"""Position of a setting in --help and in the reference of the flags; the `json_schema_extra` of its field."""

INPUT_OUTPUT: Marker = {"group": "input and output"}
MODEL: Marker = {"group": "model"}
ENGINE: Marker = {"group": "engine"}
RESOURCES: Marker = {"group": "resources"}
PUBLISHING: Marker = {"group": "publishing and gates"}
FETCHING: Marker = {"group": "fetching"}


def essential(group: Marker) -> Marker:
    """The marker of a setting that most users need: `--help` shows it, and `--help-all` shows every setting."""
    return group | {"essential": True}


REPEATED: Marker = {"repeated": True}
"""The marker of a list that is given by repeating its flag. Its values may contain commas."""


class JobConfig(BaseModel):
    """Base class of all settings: frozen, and undeclared names are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def result_settings(self, *, per_image: bool = False) -> dict[str, Any]:
        """The settings that are marked with `ChangesResults`, as JSON values by name.

        Args:
            per_image: only those on which the prediction for an image depends directly.
        """
        names = {name for name, mark in self._marks().items() if mark.per_image or not per_image}
        return self.model_dump(mode="json", include=names)

    @classmethod
    def setting_layers(cls) -> dict[str, SettingLayer]:
        """The layer of each setting on which the prediction for an image depends directly."""
        return {name: mark.layer for name, mark in cls._marks().items() if mark.per_image}

    @classmethod
    def _marks(cls) -> dict[str, ChangesResults]:
        return {
            name: mark
            for name, field in cls.model_fields.items()
            for mark in field.metadata
            if isinstance(mark, ChangesResults)
        }

    @classmethod
    def from_recorded(cls, values: Mapping[str, Any]) -> Self:
        """These settings from a record of all settings of a job, with defaults for those that it does not have.

        Raises:
            ValidationError: a recorded value is not valid in this version.
        """
        return cls.model_validate({name: values[name] for name in cls.model_fields if name in values})


class FetchSettings(JobConfig):
    """Settings for reading images and tables."""

    storage_options: dict[str, Any] = Field(
        json_schema_extra=FETCHING,
        default_factory=dict,
        description='JSON object for non-local storage, e.g. \'{"endpoint_url": "http://store:9000"}\'. '
        "Credentials should come from the standard AWS chain instead.",
    )
    allowed_root: Annotated[list[LocalFolder], ChangesResults()] = Field(
        json_schema_extra=FETCHING,
        default_factory=list,
        description="Folders from which local images may be read; repeat the flag or separate by commas. Empty: any "
        "local path.",
    )
    allow_private_addresses: Annotated[bool, ChangesResults()] = Field(
        json_schema_extra=FETCHING,
        default=False,
        description="Allow http(s) image URLs with private, loopback and link-local addresses.",
    )
    fetch_timeout_seconds: float = Field(
        json_schema_extra=FETCHING, default=30.0, gt=0, description="Timeout of a request."
    )
    fetch_attempts: int = Field(
        json_schema_extra=FETCHING,
        default=5,
        ge=1,
        le=20,
        description="Maximum number of requests per image; only transient errors are retried.",
    )
    max_image_bytes: Annotated[int, ChangesResults()] = Field(
        json_schema_extra=FETCHING,
        default=50 * 2**20,
        ge=1,
        description="Maximum size of an image file; larger files are quarantined.",
    )
    max_image_pixels: Annotated[int, ChangesResults()] = Field(
        json_schema_extra=FETCHING,
        default=89_478_485,
        ge=1,
        description="Maximum number of pixels in the image header; larger images are quarantined without decoding. The "
        "default corresponds to 256 MiB of RGB.",
    )
    min_image_side_pixels: Annotated[int, ChangesResults()] = Field(
        json_schema_extra=FETCHING,
        default=8,
        ge=1,
        description="Minimum length of the shorter side; smaller images, such as tracking pixels, are quarantined.",
    )
    decode_timeout_seconds: float = Field(
        json_schema_extra=FETCHING,
        default=30.0,
        gt=0,
        description="CPU time limit for decoding one image.",
    )
    decode_memory_mib: int = Field(
        json_schema_extra=FETCHING,
        default=2048,
        ge=1,
        description="Memory limit for the images that a worker decodes concurrently; an image that needs more is "
        "decoded alone.",
    )


class PreprocessingSettings(JobConfig):
    """Preprocessing of weights without preprocessing metadata."""

    mean: ChannelMeans | None = Field(
        json_schema_extra=MODEL, default=None, description="Mean of R,G,B in 0..1."
    )
    std: ChannelStds | None = Field(
        json_schema_extra=MODEL, default=None, description="Standard deviation of R,G,B in 0..1."
    )
    input_size: InputSize | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="Height and width of the network's input in pixels: SIDE, or HEIGHTxWIDTH such as 256x192.",
    )
    crop_mode: CropMode | None = Field(
        json_schema_extra=MODEL,
        default=None,
        description="What happens to an image with another aspect ratio than the input. center: its border is cut off; "
        "squash: it is stretched; border: it is padded.",
    )
    crop_pct: float | None = Field(
        json_schema_extra=MODEL,
        default=None,
        gt=0,
        le=1,
        description="Input size divided by the resize size, e.g. 0.875.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        json_schema_extra=MODEL, default=None, description="Resampling filter."
    )


class ClusterSettings(JobConfig):
    """Settings for connecting to Ray."""

    ray_address: str = Field(
        json_schema_extra=RESOURCES,
        default="auto",
        description="auto: the cluster at RAY_ADDRESS or on this machine, otherwise start Ray locally; local: always "
        "start Ray locally; HOST:PORT: connect to that cluster.",
    )

    @field_validator("ray_address")
    @classmethod
    def _address_can_run_ray_data(cls, value: str) -> str:
        if value.startswith("ray://"):
            raise ValueError(
                "Ray Client (ray://) is not supported; use `ray job submit` (docs/how-to/clusters.md)"
            )
        if value.startswith(("http://", "https://")):
            raise ValueError(
                f"this is the address of a dashboard; use `ray job submit --address {value} -- ...`"
            )
        return value


_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_NODE_LABEL = re.compile(rf"([a-z0-9.-]{{1,253}}/)?{_LABEL}=!?{_LABEL}")


class PlacementSettings(ClusterSettings):
    """Settings for the nodes of a cluster that a job uses."""

    use_head: bool = Field(
        json_schema_extra=RESOURCES,
        default=False,
        description="Run tasks and actors on the head node as well. Without it, the head is used only if it is the "
        "only node, and the autoscaler starts no other.",
    )
    node_labels: list[str] = Field(
        json_schema_extra=RESOURCES,
        default_factory=list,
        description="Use only nodes with these labels of Ray: KEY=VALUE, or KEY=!VALUE for nodes without the label, "
        "separated by commas, e.g. ray.io/market-type=on-demand. Nodes that the autoscaler starts must have them, too.",
    )
    require_gpu: bool = Field(
        json_schema_extra=RESOURCES,
        default=False,
        description="Never use CPUs because GPUs are missing: request a GPU node from the autoscaler and wait for it, "
        "and stop at once if the cluster has no GPU and no autoscaler that could start one. Unlike --device cuda, "
        "it is not part of a run's identity: it can be added to the command that resumes a run of --device auto.",
    )

    @field_validator("node_labels")
    @classmethod
    def _labels_are_valid(cls, value: list[str]) -> list[str]:
        for label in value:
            if not _NODE_LABEL.fullmatch(label):
                raise ValueError(
                    f"{label}: expected KEY=VALUE or KEY=!VALUE with the syntax of Kubernetes labels"
                )
            if label.startswith("ray.io/node-id="):
                raise ValueError("ray.io/node-id changes whenever a node starts; use another label")
        keys = [label.partition("=")[0] for label in value]
        if len(set(keys)) != len(keys):
            raise ValueError("a key is given twice")
        return value

    @property
    def label_selector(self) -> dict[str, str]:
        """The labels as a label selector of Ray, from key to value or !value."""
        return dict(label.split("=", 1) for label in self.node_labels)
