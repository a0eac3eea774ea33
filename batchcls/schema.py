"""Column names, Arrow schemas, and the closed list of reasons for which a row can fail."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class Stage(StrEnum):
    """The stage in which a row failed."""

    MANIFEST = "manifest"
    FETCH = "fetch"
    DECODE = "decode"
    PREDICT = "predict"


class Reason(StrEnum):
    """Why a row is in quarantine. The list is closed, so that counts by reason can be compared between runs."""

    NULL_ID = "null_id"
    DUPLICATE_ID = "duplicate_id"
    NO_IMAGE = "no_image"
    FORBIDDEN_URI = "forbidden_uri"
    UNSUPPORTED_SCHEME = "unsupported_scheme"
    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    TIMEOUT = "timeout"
    THROTTLED = "throttled"
    FETCH_FAILED = "fetch_failed"
    TOO_LARGE = "too_large"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    DECODER_CRASH = "decoder_crash"
    DECODE_TIMEOUT = "decode_timeout"
    NON_FINITE = "non_finite"


@dataclass(frozen=True, slots=True)
class ReasonRecord:
    """The stage that reports a reason, and a human-readable explanation."""

    stage: Stage
    meaning: str


REASONS: dict[Reason, ReasonRecord] = {
    Reason.NULL_ID: ReasonRecord(Stage.MANIFEST, "the item id is null"),
    Reason.DUPLICATE_ID: ReasonRecord(Stage.MANIFEST, "an earlier row has the same item id"),
    Reason.NO_IMAGE: ReasonRecord(Stage.MANIFEST, "the row has no image: uri and image are null"),
    Reason.FORBIDDEN_URI: ReasonRecord(Stage.FETCH, "the URI or path is not allowed, or is not valid UTF-8"),
    Reason.UNSUPPORTED_SCHEME: ReasonRecord(
        Stage.FETCH, "no installed filesystem supports the scheme of the URI"
    ),
    Reason.NOT_FOUND: ReasonRecord(Stage.FETCH, "the file or object does not exist"),
    Reason.ACCESS_DENIED: ReasonRecord(Stage.FETCH, "the store denied access"),
    Reason.TIMEOUT: ReasonRecord(Stage.FETCH, "no complete response within the timeout, after all attempts"),
    Reason.THROTTLED: ReasonRecord(Stage.FETCH, "the store throttled the requests, after all attempts"),
    Reason.FETCH_FAILED: ReasonRecord(Stage.FETCH, "the store or the connection failed, after all attempts"),
    Reason.TOO_LARGE: ReasonRecord(Stage.FETCH, "the file is larger than the limit"),
    Reason.EMPTY: ReasonRecord(Stage.DECODE, "the file is empty"),
    Reason.NOT_AN_IMAGE: ReasonRecord(Stage.DECODE, "the file is not in a known image format"),
    Reason.UNSUPPORTED_FORMAT: ReasonRecord(Stage.DECODE, "the image format is known but not supported"),
    Reason.TRUNCATED: ReasonRecord(Stage.DECODE, "the image is truncated"),
    Reason.CORRUPT: ReasonRecord(Stage.DECODE, "the image data is corrupt"),
    Reason.TOO_MANY_PIXELS: ReasonRecord(Stage.DECODE, "the header declares more pixels than the limit"),
    Reason.TOO_SMALL: ReasonRecord(Stage.DECODE, "the width or height is below the limit"),
    Reason.DECODER_CRASH: ReasonRecord(Stage.DECODE, "the process that decoded the image crashed"),
    Reason.DECODE_TIMEOUT: ReasonRecord(Stage.DECODE, "decoding took more CPU time than the limit"),
    Reason.NON_FINITE: ReasonRecord(Stage.PREDICT, "the outputs of the network contain NaN or infinity"),
}


RETRYABLE_REASONS = frozenset(
    {Reason.NOT_FOUND, Reason.ACCESS_DENIED, Reason.TIMEOUT, Reason.THROTTLED, Reason.FETCH_FAILED}
)
"""Reasons caused by the store or the network rather than the image; a resumed run retries such rows."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row has no prediction.

    `detail` is human-readable and never contains credentials, query strings or file contents.
    """

    reason: Reason
    detail: str


ROW = "row"
ITEM_ID = "item_id"
URI = "uri"
IMAGE = "image"
VERSION = "version"
SOURCE_VERSION = "source_version"
URI_FAULT = "uri_fault"
PIXELS = "pixels"
LARGE_PIXELS = "large_pixels"
PREDICTED_BY = "predicted_by"

SMALL, LARGE = "small", "large"
"""Values of PREDICTED_BY: the network of a cascade (`--cascade`) that predicted a row."""

TOP_K_TYPE = pa.list_(
    pa.struct([("label", pa.string()), ("class_index", pa.int32()), ("probability", pa.float32())])
)

EMBEDDING_TYPES: dict[str, pa.DataType | None] = {
    "float16": pa.float16(),
    "float32": pa.float32(),
    "none": None,
}

BELOW_THRESHOLD = "below_threshold"
"""Reason why a predicted row has no label under `--abstain`; this is not a failure and therefore not a `Reason`."""

NO_LABEL_TEXT = "(no label)"
"""Text displayed for a prediction without a label."""

# Seconds spent on a row, by stage. They are columns of the blocks; the receipt of a part contains their sums.
FETCH_SECONDS = "fetch_seconds"
DECODE_SECONDS = "decode_seconds"
PREDICT_SECONDS = "predict_seconds"
LARGE_PREDICT_SECONDS = "large_predict_seconds"

_IDENTITY = [
    pa.field(ROW, pa.int64(), nullable=False),
    pa.field(ITEM_ID, pa.string()),
    pa.field(URI, pa.string()),
]

_LOADED = [
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("content_hash", pa.string()),
    pa.field(SOURCE_VERSION, pa.string()),
    pa.field("n_bytes", pa.int64()),
    pa.field("attempts", pa.int32(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("detail", pa.string()),
    pa.field(FETCH_SECONDS, pa.float32(), nullable=False),
    pa.field(DECODE_SECONDS, pa.float32(), nullable=False),
]


def loaded_schema(kept: Sequence[pa.Field] = (), *, large_pixels: bool = False) -> pa.Schema:
    """Schema of a block between load and predict; `kept` are the manifest columns of `--keep`.

    `pixels` holds the raw bytes of the image of a row: uint8 or float32, H x W x 3, C order; five crops with
    `--tta five-crop` and `ten-crop`. It is null in a failed row, so that the value buffer of the column is exactly
    the N x H x W x 3 array of the other rows, which the predictor reads without a copy.

    With `large_pixels`, a second such column holds the images in the preprocessing of the large network of a cascade.
    """
    pixels = [PIXELS, LARGE_PIXELS] if large_pixels else [PIXELS]
    return pa.schema([*_IDENTITY, *kept, *_LOADED, *(pa.field(name, pa.large_binary()) for name in pixels)])


def prediction_fields(
    embedding: pa.DataType | None, dimension: int, *, abstain: bool = False, cascade: bool = False
) -> list[pa.Field]:
    """Columns that the predictor adds; null in failed rows.

    With `abstain`, the label of a prediction below its threshold is null, and `category_path` is the deepest node
    of the category tree that passes its threshold.

    Args:
        embedding: type of the values of the embedding; None for no such column.
        dimension: length of the embedding.
        abstain: whether the run uses `--abstain`.
        cascade: whether the run uses `--cascade`; then a column names the network that predicted the row.
    """
    fields = [
        pa.field("label", pa.string()),
        pa.field("probability", pa.float32()),
        pa.field("top_k", TOP_K_TYPE),
    ]
    if embedding is not None:
        fields.append(pa.field("embedding", pa.list_(embedding, dimension)))
    if abstain:
        fields.append(pa.field("category_path", pa.string()))
    if cascade:
        fields.append(pa.field(PREDICTED_BY, pa.string()))
    return fields


def classified_schema(
    kept: Sequence[pa.Field],
    embedding: pa.DataType | None,
    dimension: int,
    *,
    abstain: bool = False,
    cascade: bool = False,
) -> pa.Schema:
    """Schema of a block between predict and write, with both predicted and failed rows.

    The blocks of a cascade also have the column LARGE_PREDICT_SECONDS, at the end.
    """
    return pa.schema(
        [
            *_IDENTITY,
            *kept,
            *_LOADED,
            *prediction_fields(embedding, dimension, abstain=abstain, cascade=cascade),
            pa.field(PREDICT_SECONDS, pa.float32(), nullable=False),
        ]
    )


def predictions_schema(
    kept: Sequence[pa.Field],
    embedding: pa.DataType | None,
    dimension: int,
    *,
    abstain: bool = False,
    cascade: bool = False,
) -> pa.Schema:
    """Schema of `predictions/*.parquet`.

    With `abstain`, the column `reason` is BELOW_THRESHOLD in rows without a label, and null in the others.
    """
    return pa.schema(
        [
            *_IDENTITY,
            *prediction_fields(embedding, dimension, abstain=abstain, cascade=cascade),
            *([pa.field("reason", pa.string())] if abstain else []),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
            pa.field("content_hash", pa.string()),
            pa.field(SOURCE_VERSION, pa.string()),
            pa.field("origin", pa.string()),
            *kept,
        ]
    )


def quarantine_schema() -> pa.Schema:
    """Schema of `quarantine/*.parquet`."""
    return pa.schema(
        [
            *_IDENTITY,
            pa.field("reason", pa.string()),
            pa.field("stage", pa.string()),
            pa.field("detail", pa.string()),
            pa.field("n_bytes", pa.int64()),
            pa.field("content_hash", pa.string()),
            pa.field("attempts", pa.int32()),
        ]
    )


RESERVED_COLUMNS = frozenset(
    field.name
    for schema in (
        pa.schema([(URI_FAULT, pa.string()), (LARGE_PREDICT_SECONDS, pa.float32())]),
        loaded_schema(large_pixels=True),
        classified_schema((), pa.float16(), 1),
        predictions_schema((), None, 0, abstain=True, cascade=True),
        quarantine_schema(),
    )
    for field in schema
)
"""Names that a manifest column of `--keep` must not have."""
