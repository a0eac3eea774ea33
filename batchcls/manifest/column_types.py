"""Supported types of manifest columns, and the plain types that they are converted to.

The same values can have many types: text is string, large_string, string_view or a dictionary, depending on whether
Spark, Polars, pandas, DuckDB or Hugging Face's `datasets` wrote it. All are read as one type (docs/decisions/024).
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.manifest.row_ranges import Rows
from batchcls.schema import IMAGE, ITEM_ID, URI, VERSION
from batchcls.storage.uris import redact_uri

_MAX_DECIMAL_DIGITS = 38
_BYTES = "bytes"
_PATH = "path"


def plain_type(kind: pa.DataType) -> pa.DataType | None:
    """The type to which values of `kind` are converted; None if the type is not supported.

    Dictionaries and extension types are converted to the type of their values. Text becomes string, bytes become
    binary, half precision becomes float32, decimals become decimal128, and all list types become list of plain values.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return None if pa.types.is_nested(kind.value_type) else plain_type(kind.value_type)
    if pa.types.is_nested(kind):
        return _plain_nested(kind)
    return next((convert(kind) for applies, convert in _CONVERSIONS if applies(kind)), kind)


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
    return pa.decimal128(kind.precision, kind.scale) if kind.precision <= _MAX_DECIMAL_DIGITS else None


_CONVERSIONS: tuple[
    tuple[Callable[[pa.DataType], bool], Callable[[pa.DataType], pa.DataType | None]], ...
] = (
    (_is_string, lambda _: pa.string()),
    (pa.types.is_decimal, _plain_decimal),  # before bytes, because Arrow considers decimals fixed-size binary
    (_is_bytes, lambda _: pa.binary()),
    (pa.types.is_float16, lambda _: pa.float32()),
    (pa.types.is_duration, lambda _: None),
    (pa.types.is_interval, lambda _: None),
)
"""Types that are converted to another type or not supported; all others are unchanged."""


def _plain_nested(kind: pa.DataType) -> pa.DataType | None:
    if any(isinstance(kind.field(index).type, pa.BaseExtensionType) for index in range(kind.num_fields)):
        return None  # Arrow cannot cast nested extension types.
    inner = [plain_type(kind.field(index).type) for index in range(kind.num_fields)]
    if any(inner_type is None for inner_type in inner):
        return None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(inner[0])
    if pa.types.is_map(kind):
        key, value = plain_type(kind.key_type), plain_type(kind.item_type)
        return None if key is None or value is None else pa.map_(key, value)
    names = [kind.field(index).name for index in range(kind.num_fields)]
    if not pa.types.is_struct(kind) or len(set(names)) < len(names):
        return None
    return pa.struct(list(zip(names, inner, strict=True)))


def unsupported_type_reason(kind: pa.DataType) -> str:
    """Why a column without a plain type cannot be kept."""
    if pa.types.is_decimal(kind):
        return f"Parquet readers support decimals of at most {_MAX_DECIMAL_DIGITS} digits"
    if pa.types.is_duration(kind):
        return "Parquet has no durations, so all readers except Arrow read a number"
    return "Parquet readers interpret it differently"


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    """The plain type that can represent all values of two plain types; None if there is none."""
    if first == second or pa.types.is_null(first):
        return second
    if pa.types.is_null(second):
        return first
    if pa.types.is_integer(first) and pa.types.is_integer(second):
        return _common_integer(first, second)
    if pa.types.is_floating(first) and pa.types.is_floating(second):
        return max(first, second, key=lambda kind: kind.bit_width)
    if pa.types.is_decimal(first) and pa.types.is_decimal(second) and first.scale == second.scale:
        return max(first, second, key=lambda kind: kind.precision)
    return _common_nested(first, second)


def _common_integer(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    if pa.types.is_signed_integer(first) == pa.types.is_signed_integer(second):
        return max(first, second, key=lambda kind: kind.bit_width)
    signed, unsigned = (first, second) if pa.types.is_signed_integer(first) else (second, first)
    return signed if signed.bit_width > unsigned.bit_width else None


def _common_nested(first: pa.DataType, second: pa.DataType) -> pa.DataType | None:
    if pa.types.is_list(first) and pa.types.is_list(second):
        inner = common_type(first.value_type, second.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_map(first) and pa.types.is_map(second):
        key, value = (
            common_type(first.key_type, second.key_type),
            common_type(first.item_type, second.item_type),
        )
        return None if key is None or value is None else pa.map_(key, value)
    if not (pa.types.is_struct(first) and pa.types.is_struct(second)):
        return None
    if [field.name for field in first] != [field.name for field in second]:
        return None
    inner = [(one.name, common_type(one.type, other.type)) for one, other in zip(first, second, strict=True)]
    return None if any(kind is None for _, kind in inner) else pa.struct(inner)


def null_as_string(kind: pa.DataType) -> pa.DataType:
    """Replace null types by string, because pandas writes text columns without values as null."""
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
    """Whether values of a plain type are text or contain text."""
    if pa.types.is_nested(kind):
        return any(holds_text(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_string(kind))


def to_plain_type(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Convert a column to a plain type or to large_binary. Text is not validated and may be invalid UTF-8.

    Raises:
        pa.ArrowException: the values cannot be converted, or exceed the maximum size of a chunk of that type.
    """
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.cast(values.type.storage_type)
    if pa.types.is_dictionary(values.type):
        # Arrow cannot decode dictionaries whose values are views.
        chunks = [
            pa.DictionaryArray.from_arrays(chunk.indices, _cast(chunk.dictionary, kind))
            for chunk in values.chunks
        ]
        values = pa.chunked_array(chunks, pa.dictionary(values.type.index_type, kind))
    return _cast(values, kind)


def _cast(values: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return values if values.type == kind else values.cast(kind)


def image_bytes(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert a column of inline images to large_binary, which has no limit of 2 GiB per chunk."""
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, _BYTES)
    return to_plain_type(values, pa.large_binary())


def image_paths(values: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Paths of images whose bytes are null, as written by Hugging Face's `datasets`; None if the column has none."""
    if not pa.types.is_struct(values.type) or values.type.get_field_index(_PATH) < 0:
        return None
    paths = to_plain_type(pc.struct_field(values, _PATH), pa.string())
    has_bytes = pc.is_valid(pc.struct_field(values, _BYTES))
    return pc.if_else(has_bytes, pa.scalar(None, pa.string()), paths)


def _first_invalid_text(values: pa.Array) -> int | None:
    """Index of the first value that contains invalid UTF-8; None if all text is valid."""
    if _is_valid(values):
        return None
    # Copy, because validation of a slice of lists includes the values outside of the slice.
    values = values.take(pa.array(range(len(values))))
    if _is_valid(values):
        return None
    low, high = 0, len(values)  # The first invalid value is in low..high-1.
    while high - low > 1:
        middle = (low + high) // 2
        if _is_valid(values.take(pa.array(range(low, middle)))):
            low = middle
        else:
            high = middle
    return low


def _is_valid(values: pa.Array) -> bool:
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def split_invalid_text(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.Array]:
    """Split text into valid values and escaped invalid ones; each is null where the other is not."""
    if all(_is_valid(chunk) for chunk in values.chunks):
        return values, pa.nulls(len(values), pa.string())
    valid: list[str | None] = []
    invalid: list[str | None] = []
    for data in values.cast(pa.binary()).to_pylist():
        try:
            valid.append(None if data is None else data.decode())
            invalid.append(None)
        except UnicodeDecodeError:
            valid.append(None)
            invalid.append(data.decode(errors="backslashreplace"))
    return pa.chunked_array([pa.array(valid, pa.string())]), pa.array(invalid, pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type can contain ids or URIs; a column of nulls can."""
    plain = plain_type(kind)
    return plain is not None and bool(pa.types.is_string(plain) or pa.types.is_null(plain))


def is_image(kind: pa.DataType) -> bool:
    """Whether a column of this type can contain inline images: bytes, or a struct with the field `bytes`."""
    if not pa.types.is_struct(kind):
        plain = plain_type(kind)
        return plain is not None and bool(pa.types.is_binary(plain) or pa.types.is_null(plain))
    names = [field.name for field in kind]
    if names.count(_BYTES) != 1 or names.count(_PATH) > 1:
        return False
    bytes_type = kind.field(_BYTES).type
    is_path_text = _PATH not in names or is_text(kind.field(_PATH).type)
    return is_path_text and not pa.types.is_struct(bytes_type) and is_image(bytes_type)


def is_version(kind: pa.DataType) -> bool:
    """Whether a column of this type can contain the versions of images: text or integers."""
    plain = plain_type(kind)
    return is_text(kind) or (plain is not None and bool(pa.types.is_integer(plain)))


def is_label(kind: pa.DataType) -> bool:
    """Whether a column of this type can contain labels: text, integers or booleans."""
    plain = plain_type(kind)
    return is_version(kind) or (plain is not None and bool(pa.types.is_boolean(plain)))


@dataclass(frozen=True, slots=True)
class InputColumn:
    """A column that jobs read from a manifest.

    Attributes:
        name: name of the column, or its default name if a flag can select another column.
        flag: flag that selects another column; None if the name is fixed.
        types: supported types in words, for messages and the documentation.
        accepts: whether a column of an Arrow type can be read.
        remedy: what to do about a column of another type, for messages.
    """

    name: str
    flag: str | None
    types: str
    accepts: Callable[[pa.DataType], bool]
    remedy: str

    def require_type(self, kind: pa.DataType, name: str) -> None:
        """Check the type of a column.

        Args:
            kind: type of the column.
            name: how the message identifies the column.

        Raises:
            InputError: columns of this type cannot be read.
        """
        if not self.accepts(kind):
            raise InputError(f"{name} has type {kind}, but {self.types} is required; {self.remedy}")


_CAST = "cast it when writing the manifest"

ITEM_ID_COLUMN = InputColumn(ITEM_ID, "--id-column", "string", is_text, _CAST)
URI_COLUMN = InputColumn(URI, None, "string", is_text, _CAST)
IMAGE_COLUMN = InputColumn(
    IMAGE,
    None,
    f"binary or struct<{_BYTES}: binary, {_PATH}: string>",
    is_image,
    "it contains the bytes of the image file",
)
VERSION_COLUMN = InputColumn(
    VERSION, None, "string or integer", is_version, "it identifies the version of the image"
)
LABEL_COLUMN = InputColumn(
    "label",
    "--label-column",
    "string, integer or boolean",
    is_label,
    "name the column with the true class names",
)

INPUT_COLUMNS = (ITEM_ID_COLUMN, URI_COLUMN, IMAGE_COLUMN, VERSION_COLUMN, LABEL_COLUMN)
"""The input columns of manifests. The table in docs/reference/manifest.md is generated from them."""


def require_utf8(values: pa.ChunkedArray, rows: Rows, column: str, uri: str) -> None:
    """Check that text is valid UTF-8.

    Args:
        values: values of a plain type.
        rows: row numbers of the values in the manifest.
        column: name of the column.
        uri: URI of the file.

    Raises:
        InputError: text is invalid; the message contains the file, the column and the row.
    """
    start = 0
    for chunk in values.chunks:
        index = _first_invalid_text(chunk)
        if index is not None:
            raise InputError(
                f"{redact_uri(uri)}: column {column}, row {rows[start + index]}: the text is not valid UTF-8; write it "
                "as UTF-8, or correct the row"
            )
        start += len(chunk)
