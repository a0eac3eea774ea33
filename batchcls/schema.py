"""Column schemas and closed lists that all stages and readers of a run share.

Nothing here does any work: names, Arrow types and the reasons a row can fail for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class Stage(StrEnum):
    """Where in the flow a row failed."""

    MANIFEST = "manifest"
    FETCH = "fetch"
    DECODE = "decode"
    PREDICT = "predict"


class Reason(StrEnum):
    """Why a row is in quarantine; closed, so that counts by reason can be compared between runs."""

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
    """What is known of a reason: the stage that gives it and a sentence for people."""

    stage: Stage
    meaning: str


REASONS: dict[Reason, ReasonRecord] = {
    Reason.NULL_ID: ReasonRecord(Stage.MANIFEST, "the item id is null"),
    Reason.DUPLICATE_ID: ReasonRecord(Stage.MANIFEST, "an earlier row has the same item id"),
    Reason.NO_IMAGE: ReasonRecord(Stage.MANIFEST, "the row names no image: uri and image are null"),
    Reason.FORBIDDEN_URI: ReasonRecord(
        Stage.FETCH, "the address or path is not allowed, or is no valid text"
    ),
    Reason.UNSUPPORTED_SCHEME: ReasonRecord(Stage.FETCH, "no installed filesystem speaks this scheme"),
    Reason.NOT_FOUND: ReasonRecord(Stage.FETCH, "there is no such file or object"),
    Reason.ACCESS_DENIED: ReasonRecord(Stage.FETCH, "the store refused to give it"),
    Reason.TIMEOUT: ReasonRecord(Stage.FETCH, "no complete answer in time, after all attempts"),
    Reason.THROTTLED: ReasonRecord(Stage.FETCH, "the store asked to slow down, after all attempts"),
    Reason.FETCH_FAILED: ReasonRecord(Stage.FETCH, "the store or the connection failed, after all attempts"),
    Reason.TOO_LARGE: ReasonRecord(Stage.FETCH, "more bytes than the limit"),
    Reason.EMPTY: ReasonRecord(Stage.DECODE, "zero bytes"),
    Reason.NOT_AN_IMAGE: ReasonRecord(Stage.DECODE, "the bytes are no image format that is known"),
    Reason.UNSUPPORTED_FORMAT: ReasonRecord(Stage.DECODE, "an image, of a format that is not decoded"),
    Reason.TRUNCATED: ReasonRecord(Stage.DECODE, "the image ends before it is complete"),
    Reason.CORRUPT: ReasonRecord(Stage.DECODE, "the decoder found damage"),
    Reason.TOO_MANY_PIXELS: ReasonRecord(Stage.DECODE, "the header promises more pixels than the limit"),
    Reason.TOO_SMALL: ReasonRecord(Stage.DECODE, "a side is shorter than the limit"),
    Reason.DECODER_CRASH: ReasonRecord(Stage.DECODE, "the decoder's process died on it"),
    Reason.DECODE_TIMEOUT: ReasonRecord(Stage.DECODE, "decoding took more processor time than the limit"),
    Reason.NON_FINITE: ReasonRecord(Stage.PREDICT, "the network answered with NaN or infinity"),
}


RETRYABLE_REASONS = frozenset(
    {Reason.NOT_FOUND, Reason.ACCESS_DENIED, Reason.TIMEOUT, Reason.THROTTLED, Reason.FETCH_FAILED}
)
"""Reasons that lie with the store or the network and not with the image: a run that goes on tries such rows again."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one row has no prediction.

    `detail` is for people: it never holds credentials, query strings or file contents.
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

# Seconds of work spent on a row, by stage; they travel with the row so that a written part can
# say what it cost, and are summed there.
FETCH_SECONDS = "fetch_seconds"
DECODE_SECONDS = "decode_seconds"
PREDICT_SECONDS = "predict_seconds"

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


def loaded_schema(kept: Sequence[pa.Field] = ()) -> pa.Schema:
    """Schema of a block between load and predict.

    `pixels` holds the raw bytes of one image a row (uint8 or float32, H x W x 3, C order; five such
    crops where `--tta` asks for them) and is null in a failed row, so the column's value buffer is
    exactly the N x H x W x 3 array of the good rows and the predictor reads it without a copy.
    """
    return pa.schema([*_IDENTITY, *kept, *_LOADED, pa.field(PIXELS, pa.large_binary())])


def answer_fields(embedding: pa.DataType | None, dimension: int, *, abstain: bool = False) -> list[pa.Field]:
    """The columns that the predictor adds; null in failed rows.

    With `abstain` the label of an answer that is not sure enough is null, and `category_path` says what
    can be said of it in the tree of categories.
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
    return fields


def classified_schema(
    kept: Sequence[pa.Field], embedding: pa.DataType | None, dimension: int, *, abstain: bool = False
) -> pa.Schema:
    """Schema of a block between predict and write: answered and failed rows together."""
    return pa.schema(
        [
            *_IDENTITY,
            *kept,
            *_LOADED,
            *answer_fields(embedding, dimension, abstain=abstain),
            pa.field(PREDICT_SECONDS, pa.float32(), nullable=False),
        ]
    )


def predictions_schema(
    kept: Sequence[pa.Field], embedding: pa.DataType | None, dimension: int, *, abstain: bool = False
) -> pa.Schema:
    """Schema of `predictions/*.parquet`, as readers see it.

    With `abstain` the column `reason` is BELOW_THRESHOLD where the label is null for that, else null.
    """
    return pa.schema(
        [
            *_IDENTITY,
            *answer_fields(embedding, dimension, abstain=abstain),
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
    """Schema of `quarantine/*.parquet`, as readers see it."""
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
        pa.schema([(URI_FAULT, pa.string())]),
        loaded_schema(),
        classified_schema((), pa.float16(), 1),
        predictions_schema((), None, 0, abstain=True),
        quarantine_schema(),
    )
    for field in schema
)
"""Names that a kept manifest column must not have."""
