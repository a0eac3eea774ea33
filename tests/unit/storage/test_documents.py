"""Stored documents: strict reading, unknown keys and versions."""

import json
from typing import Literal

import pytest

from batchcls.storage.documents import (
    Count,
    Document,
    DocumentError,
    NewerVersionError,
    StoredRecord,
    UtcTime,
)


class Part(StoredRecord):
    rows: Count
    share: float | None = None


class Example(Document):
    format: Literal["example"] = "example"
    parts: tuple[Part, ...] = ()
    created: UtcTime | None = None


def test_document_is_read_back_with_its_unknown_keys():
    data = json.dumps({"version": 1, "parts": [{"rows": 3, "note": "kept"}], "later": {"a": [None, 1.5]}})
    found = Example.from_json(data.encode())
    assert found.parts[0].rows == 3
    written = json.loads(found.to_json())
    assert written["later"] == {"a": [None, 1.5]}
    assert written["parts"] == [{"rows": 3, "share": None, "note": "kept"}]
    assert Example.from_json(found.to_json()) == found


def test_document_of_a_newer_version_is_refused_with_the_remedy():
    with pytest.raises(NewerVersionError, match=r"version 2 .* reads up to version 1; upgrade batchcls"):
        Example.from_json(b'{"version": 2, "parts": "of another type"}')
    assert Example.from_json(b"{}").version == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "expected a JSON object, found list"),
        (b"[" * 500_000, "nested too deeply"),
        (b'{"a":' * 500_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nested too deeply"),
        (b'{"a": 9223372036854775808}', "beyond 64 bits"),
        (b'{"a": "\\ud800"}', "unpaired surrogate"),
        (b'{"version": "1"}', "version: Input should be a valid integer"),
        (b'{"version": 0}', "version: "),
        (b'{"format": "other"}', "format: "),
        (b'{"parts": [{}]}', "parts.0.rows: Field required"),
        (b'{"parts": [{"rows": "3"}]}', "parts.0.rows: Input should be a valid integer"),
        (b'{"parts": [{"rows": true}]}', "parts.0.rows: Input should be a valid integer"),
        (b'{"parts": [{"rows": -1}]}', "parts.0.rows: "),
        (b'{"created": "yesterday"}', "created: "),
        (b'{"created": 5}', "created: "),
        (b'{"created": "0001-01-01T00:00:00+05:00"}', "outside the range of dates"),
    ],
)
def test_invalid_document_is_an_error_that_names_the_field(data: bytes, message: str):
    with pytest.raises(DocumentError) as caught:
        Example.from_json(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, NewerVersionError)


def test_times_are_in_utc():
    found = Example.from_json(b'{"created": "2026-11-26T01:15:00+02:00"}')
    assert str(found.created) == "2026-11-25 23:15:00+00:00"
    assert Example.from_json(b'{"created": "2026-11-25T23:15:00"}').created == found.created
