"""Schemas of plan.json, run.json, current.json and related files, which are validated when they are read.

Whoever reads a run relies on the types that are stated here. What does not have them is damaged, whatever
is wrong with it: no JSON, another JSON type in any place, numbers beyond 64 bits, text that no UTF-8 can hold,
nesting without end, dates that are no dates. Keys that this version does not know are allowed and kept.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

_MAX_DEPTH = 64
_LARGEST = 2**63 - 1

HISTOGRAM_BINS = 20
"""Equal bins of the confidence from 0 to 1; 1.0 itself is in the last."""


class DocumentError(ValueError):
    """A file is not what this program writes; the text says which field and why, in one line."""


def parse_time(text: str) -> datetime:
    """An ISO time in UTC; one without a zone, which was never written, is taken as UTC.

    Raises:
        ValueError: it is no time, or one that no calendar has.
    """
    found = datetime.fromisoformat(text)
    try:
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("beyond the calendar") from None


def _is_time(text: str) -> str:
    parse_time(text)
    return text


def _is_name(text: str) -> str:
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise ValueError("not the name of a folder")
    return text


def _is_inside(text: str) -> str:
    if not text or text.startswith("/") or "\0" in text or ".." in text.split("/"):
        raise ValueError("not a path inside the run's folder")
    return text


Count = Annotated[int, Field(ge=0)]
Time = Annotated[str, AfterValidator(_is_time)]
Name = Annotated[str, AfterValidator(_is_name)]
Path = Annotated[str, AfterValidator(_is_inside)]


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class _Manifest(_Document):
    uri: str | None = None
    base: str | None = None
    fingerprint: str | None = None
    rows: Count | None = None
    files: Count | None = None


class _Model(_Document):
    fingerprint: str = ""
    architecture: str | None = None
    classes: Count = 0


class _Counts(_Document):
    rows: Count
    predicted: Count
    quarantined: Count
    reused: Count = 0
    quarantined_by_reason: dict[str, Count] = {}


class _File(_Document):
    path: Path
    kind: Literal["predictions", "quarantine"]
    rows: Count
    bytes: Count
    digest: str


class _Gate(_Document):
    gate: str
    figure: float | None
    limit: float | None
    passed: bool
    sentence: str


class _Embeddings(_Document):
    dimension: Count
    rows: Count
    mean_norm: float
    std_norm: float
    non_finite: Count


class _Summary(_Document):
    answered: Count
    categories: dict[str, Count]
    mean_confidence: float | None
    std_confidence: float | None = None
    confidence_histogram: Annotated[list[Count], Field(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)]
    embeddings: _Embeddings | None


class _Resource(_Document):
    name: str
    limits: str
    stages: list[str]
    capacity: float


class _Bottleneck(_Document):
    limited_by: str
    ideal_images_per_second: float | None
    images_per_second_after_start: float | None
    start_seconds: float
    busy_milliseconds_per_image: dict[str, float]
    resources: list[_Resource]
    advice: str


class _Measured(_Document):
    images_per_second: float | None = None
    seconds_total: float | None = None
    bottleneck: _Bottleneck | None = None


class RunDocument(_Document):
    """run.json: what every committed run has, and what newer ones have beside it."""

    run_id: Name
    committed: Time
    manifest: _Manifest
    model: _Model
    counts: _Counts
    files: list[_File]
    unpublishable: list[str] = []
    answers: dict[str, Any] = {}
    image_bytes: Count = 0
    baseline: Name | None = None
    gates: list[_Gate] = []
    summary: _Summary | None = None
    measured: _Measured = _Measured()


class _Fingerprints(_Document):
    manifest: str = ""
    model: str = ""
    settings: dict[str, Any] = {}


class _Reuse(_Document):
    run_id: Name
    by_row: bool


class _Nothing(_Document):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class PlanDocument(_Document):
    """plan.json, whose format is what tells a run of this program from other folders."""

    format: Literal["batchcls-plan-1"]
    run_id: Name
    created: Time
    fingerprints: _Fingerprints = _Fingerprints()
    config: dict[str, Any] = {}
    manifest: _Manifest = _Manifest()
    engines: dict[str, Any] = {}
    reuse: _Nothing | _Reuse = _Nothing()
    unpublishable: list[str] = []


class _Former(_Document):
    run_id: Name
    published: Time
    replaced: Time
    withdrawn: bool


class CurrentDocument(_Document):
    """current.json."""

    run_id: Name
    published: Time
    history: list[_Former] = []


class LeaseDocument(_Document):
    """A file in the folder `lease`, as far as it tells that this program wrote it."""

    owner: str
    host: str
    place: str
    pid: int
    beat: float


class ReaderDocument(_Document):
    """readers/NAME.json: until when a reader wants the run kept."""

    until: Time


class RemovalDocument(_Document):
    """removal.json: `runs prune` has decided to remove the run and may have begun to."""

    format: Literal["batchcls-removal-1"]


def parse(data: bytes, kind: type[BaseModel]) -> dict[str, Any]:
    """Bytes of a file -> its JSON object, whose fields have the types of `kind`.

    Raises:
        DocumentError: they have not, or it is no JSON object.
    """
    try:
        raw = json.loads(data)
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except ValueError as error:
        raise DocumentError(f"no JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DocumentError(f"a JSON object is expected, this is {type(raw).__name__}")
    _require_bounded(raw)
    try:
        kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DocumentError(f"{place}: {first['msg']}") from None
    return raw


def _require_bounded(raw: Mapping[str, Any]) -> None:
    """Raise DocumentError for what JSON allows and nothing can print, store or count."""
    waiting: list[tuple[Any, int]] = [(raw, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise DocumentError("nested too deeply")
        if isinstance(value, dict):
            waiting += ((inner, depth + 1) for pair in value.items() for inner in pair)
        elif isinstance(value, list):
            waiting += ((inner, depth + 1) for inner in value)
        elif isinstance(value, str):
            _require_text(value)
        elif isinstance(value, int) and abs(value) > _LARGEST:
            raise DocumentError("a number beyond 64 bits")


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DocumentError("text with half of a surrogate pair") from None
