"""Supported storage types of manifest columns, and the plain types that they are read as.

One kind of value has many types: text is string, large_string, string_view or a dictionary, as Spark, Polars,
pandas, DuckDB and Hugging Face's `datasets` write it. Each is read as one (docs/decisions/024).
"""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.manifest.row_ranges import Rows
from batchcls.storage.uris import redact_uri

_LARGEST_DECIMAL = 38
_BYTES = "bytes"
_PATH = "path"

IMAGE_TYPES = f"binary, or struct<{_BYTES}: binary, {_PATH}: string>,"
"""What a column of inline images may be, for messages."""


def plain_type(kind: pa.DataType) -> pa.DataType | None:
    """The type that values of `kind` are read as; None where there is none.

    Dictionaries and extension types count as what they hold. Text becomes string, bytes binary, half precision
    float32, decimals decimal128; lists of every kind become list, with plain values.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return None if pa.types.is_nested(kind.value_type) else plain_type(kind.value_type)
    if pa.types.is_nested(kind):
        return _plain_nested(kind)
    return next((plain(kind) for fits, plain in _PLAIN if fits(kind)), kind)


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _plain_decimal(kind: pa.DataType) -> pa.DataType | None:
    return pa.decimal128(kind.precision, kind.scale) if kind.precision <= _LARGEST_DECIMAL else None


_PLAIN: tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], pa.DataType | None]], ...] = (
    (_is_string, lambda _: pa.string()),
    (pa.types.is_decimal, _plain_decimal),  # before bytes, which decimals are to Arrow
    (_is_bytes, lambda _: pa.binary()),
    (pa.types.is_float16, lambda _: pa.float32()),
    (pa.types.is_duration, lambda _: None),
    (pa.types.is_interval, lambda _: None),
)
"""Types that are read as another one, or not at all; all others are read as they are."""


def _plain_nested(kind: pa.DataType) -> pa.DataType | None:
    if any(isinstance(kind.field(place).type, pa.BaseExtensionType) for place in range(kind.num_fields)):
        return None  # Arrow casts extension types outside of others only
    inner = [plain_type(kind.field(place).type) for place in range(kind.num_fields)]
    if any(found is None for found in inner):
        return None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(inner[0])
    if pa.types.is_map(kind):
        key, value = plain_type(kind.key_type), plain_type(kind.item_type)
        return None if key is None or value is None else pa.map_(key, value)
    names = [kind.field(place).name for place in range(kind.num_fields)]
    if not pa.types.is_struct(kind) or len(set(names)) < len(names):
        return None
    return pa.struct(list(zip(names, inner, strict=True)))


def unsupported_type_reason(kind: pa.DataType) -> str:
    """Why a column without a plain type cannot pass through."""
    if pa.types.is_decimal(kind):
        return f"readers of Parquet hold decimals of {_LARGEST_DECIMAL} digits at most"
    if pa.types.is_duration(kind):
        return "Parquet has no durations, so that every reader but Arrow sees a number"
    return "readers of Parquet do not agree on it"


def common_type(ours: pa.DataType, theirs: pa.DataType) -> pa.DataType | None:
    """The plain type that holds every value of two plain types; None if there is none."""
    if ours == theirs or pa.types.is_null(ours):
        return theirs
    if pa.types.is_null(theirs):
        return ours
    if pa.types.is_integer(ours) and pa.types.is_integer(theirs):
        return _one_integer(ours, theirs)
    if pa.types.is_floating(ours) and pa.types.is_floating(theirs):
        return max(ours, theirs, key=lambda kind: kind.bit_width)
    if pa.types.is_decimal(ours) and pa.types.is_decimal(theirs) and ours.scale == theirs.scale:
        return max(ours, theirs, key=lambda kind: kind.precision)
    return _one_nested(ours, theirs)


def _one_integer(ours: pa.DataType, theirs: pa.DataType) -> pa.DataType | None:
    if pa.types.is_signed_integer(ours) == pa.types.is_signed_integer(theirs):
        return max(ours, theirs, key=lambda kind: kind.bit_width)
    signed, unsigned = (ours, theirs) if pa.types.is_signed_integer(ours) else (theirs, ours)
    return signed if signed.bit_width > unsigned.bit_width else None


def _one_nested(ours: pa.DataType, theirs: pa.DataType) -> pa.DataType | None:
    if pa.types.is_list(ours) and pa.types.is_list(theirs):
        inner = common_type(ours.value_type, theirs.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_map(ours) and pa.types.is_map(theirs):
        key, value = (
            common_type(ours.key_type, theirs.key_type),
            common_type(ours.item_type, theirs.item_type),
        )
        return None if key is None or value is None else pa.map_(key, value)
    if not (pa.types.is_struct(ours) and pa.types.is_struct(theirs)):
        return None
    if [field.name for field in ours] != [field.name for field in theirs]:
        return None
    inner = [(one.name, common_type(one.type, other.type)) for one, other in zip(ours, theirs, strict=True)]
    return None if any(kind is None for _, kind in inner) else pa.struct(inner)


def null_as_string(kind: pa.DataType) -> pa.DataType:
    """A column of nulls in all files is text without a value: pandas writes such columns as null."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(null_as_string(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(null_as_string(kind.key_type), null_as_string(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, null_as_string(field.type)) for field in kind])
    return kind


def holds_text(kind: pa.DataType) -> bool:
    """Whether values of a plain type are text or have text in them."""
    if pa.types.is_nested(kind):
        return any(holds_text(kind.field(place).type) for place in range(kind.num_fields))
    return bool(pa.types.is_string(kind))


def to_plain_type(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as a plain type, or as large_binary; text is not looked at, so it may still be no UTF-8.

    Raises:
        pa.ArrowException: it is of another kind, or more than a chunk of that type can hold.
    """
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        # Arrow has no kernel that decodes a dictionary of views.
        chunks = [
            pa.DictionaryArray.from_arrays(chunk.indices, _cast(chunk.dictionary, kind))
            for chunk in values.chunks
        ]
        values = pa.chunked_array(chunks, pa.dictionary(values.type.index_type, kind))
    return _cast(values, kind)


def _cast(values: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values if values.type == kind else values.cast(kind)


def image_bytes(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of inline images as large_binary, which any number of bytes fits into."""
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, _BYTES)
    return to_plain_type(values, pa.large_binary())


def image_paths(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Where images lie whose bytes are null, as Hugging Face's `datasets` writes it; None where nothing says so."""
    if not pa.types.is_struct(values.type) or values.type.get_field_index(_PATH) < 0:
        return None
    paths = to_plain_type(pc.struct_field(values, _PATH), pa.string())
    inside = pc.is_valid(pc.struct_field(values, _BYTES))
    return pc.if_else(inside, pa.scalar(None, pa.string()), paths)


def _first_bad_text(values: pa.Array) -> int | None:
    """The place of the first value that has text in it which is no UTF-8; None if all is well."""
    if _is_well(values):
        return None
    # A copy: a slice of lists would be judged by all values of the lists that it is cut from.
    values = values.take(pa.array(range(len(values))))
    if _is_well(values):
        return None
    low, high = 0, len(values)  # the first bad value is in low..high-1
    while high - low > 1:
        middle = (low + high) // 2
        if _is_well(values.take(pa.array(range(low, middle)))):
            low = middle
        else:
            high = middle
    return low


def _is_well(values: pa.Array) -> bool:
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def split_invalid_text(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.Array]:
    """Text with nulls in place of what is no UTF-8, and what was there, its bytes escaped; null elsewhere."""
    if all(_is_well(chunk) for chunk in values.chunks):
        return values, pa.nulls(len(values), pa.string())
    good: list[str | None] = []
    bad: list[str | None] = []
    for data in values.cast(pa.binary()).to_pylist():
        try:
            good.append(None if data is None else data.decode())
            bad.append(None)
        except UnicodeDecodeError:
            good.append(None)
            bad.append(data.decode(errors="backslashreplace"))
    return pa.chunked_array([pa.array(good, pa.string())]), pa.array(bad, pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of that type can be ids or addresses; one of nulls can."""
    plain = plain_type(kind)
    return plain is not None and bool(pa.types.is_string(plain) or pa.types.is_null(plain))


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of that type can hold inline images: bytes, or a struct that has them in `bytes`."""
    if not pa.types.is_struct(kind):
        plain = plain_type(kind)
        return plain is not None and bool(pa.types.is_binary(plain) or pa.types.is_null(plain))
    names = [field.name for field in kind]
    if names.count(_BYTES) != 1 or names.count(_PATH) > 1:
        return False
    inside = kind.field(_BYTES).type
    is_path_text = _PATH not in names or is_text(kind.field(_PATH).type)
    return is_path_text and not pa.types.is_struct(inside) and is_image(inside)


def is_version(kind: pa.DataType) -> bool:
    """Whether a column of that type can say the state of an image: text, or whole numbers."""
    plain = plain_type(kind)
    return is_text(kind) or (plain is not None and bool(pa.types.is_integer(plain)))


def require_utf8(values: pa.ChunkedArray, rows: Rows, column: str, uri: str) -> None:
    """Refuse text that is no UTF-8.

    Args:
        values: of a plain type.
        rows: their rows' numbers in the manifest.
        column: its name.
        uri: of the file.

    Raises:
        InputError: names the file, the column and the row.
    """
    start = 0
    for chunk in values.chunks:
        place = _first_bad_text(chunk)
        if place is not None:
            raise InputError(
                f"{redact_uri(uri)}: column {column}, row {rows[start + place]}: the text is no valid UTF-8; write it "
                "as UTF-8, or correct the row"
            )
        start += len(chunk)
