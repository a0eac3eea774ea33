"""Base classes of the JSON documents that the program writes and reads back.

Each document is one class: `to_json` writes it and `from_json` reads it with strict types. Unknown keys are allowed and
kept, so a rewritten document loses nothing. Text that is not UTF-8, numbers beyond 64 bits and nesting deeper than 64
levels are rejected, because other readers cannot represent them. A document without a version is of version 1.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

_MAX_DEPTH = 64
_MAX_INTEGER = 2**63 - 1


class DocumentError(ValueError):
    """A file is not a valid document; the message names the field and the reason in one line."""


class NewerVersionError(DocumentError):
    """A later version of the program wrote the file in a format that this version does not know."""


def parse_time(text: str) -> datetime:
    """Parse an ISO 8601 time; a time without a time zone is in UTC.

    Raises:
        ValueError: the text is not a time, or the time is outside the range of dates in UTC.
    """
    return _in_utc(datetime.fromisoformat(text))


def _in_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except OverflowError:
        raise ValueError("outside the range of dates") from None


def _folder_name(text: str) -> str:
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise ValueError("not the name of a folder")
    return text


def _relative_path(text: str) -> str:
    if not text or text.startswith("/") or "\0" in text or ".." in text.split("/"):
        raise ValueError("not a path inside the folder")
    return text


Count = Annotated[int, Field(ge=0)]
UtcTime = Annotated[datetime, AfterValidator(_in_utc)]
FolderName = Annotated[str, AfterValidator(_folder_name)]
RelativePath = Annotated[str, AfterValidator(_relative_path)]


class StoredRecord(BaseModel):
    """A part of a document: immutable, with strict types; unknown keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, ser_json_inf_nan="constants")


class Document(StoredRecord):
    """The contents of a JSON file."""

    VERSION: ClassVar[int] = 1
    """The version that this program writes, and the latest that it reads."""

    version: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse the contents of a file.

        Raises:
            NewerVersionError: a later version of the program wrote the file.
            DocumentError: the data is not JSON, or a field is missing or has the wrong type.
        """
        _require_supported(data, cls.VERSION)
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "document"
            raise DocumentError(f"{field}: {first['msg']}") from None

    def to_json(self, *, indent: int | None = 2) -> bytes:
        """The contents of the file, in UTF-8."""
        return f"{self.model_dump_json(indent=indent)}\n".encode()


def _require_supported(data: bytes, version: int) -> None:
    """Raise DocumentError for JSON that only Python can represent, and for later versions of a document."""
    try:
        raw = json.loads(data)
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except ValueError as error:
        raise DocumentError(f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DocumentError(f"expected a JSON object, found {type(raw).__name__}")
    _require_bounded(raw)
    found = raw.get("version")
    if type(found) is int and found > version:
        raise NewerVersionError(
            f"it has version {found} of its format and this program reads up to version {version}; upgrade batchcls"
        )


def _require_bounded(raw: Mapping[str, Any]) -> None:
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
            _require_utf8(value)
        elif isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise DocumentError("a number beyond 64 bits")


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DocumentError("text with an unpaired surrogate") from None
