"""Which columns a manifest has, and whether its files agree on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.schema import IMAGE, URI
from batchcls.storage import FileInfo, redact_uri


@dataclass(frozen=True, slots=True)
class Columns:
    """Which of the manifest's columns plays which part; None where the manifest has none."""

    item_id: str
    uri: str | None
    image: str | None
    kept: tuple[pa.Field, ...]

    @property
    def names(self) -> list[str]:
        """The columns that a load task reads, no others."""
        parts = (self.item_id, self.uri, self.image, *(field.name for field in self.kept))
        return [name for name in parts if name is not None]


def agree_on_columns(
    found: list[FileInfo], footers: list[pq.FileMetaData], id_column: str, keep: Sequence[str]
) -> Columns:
    """The columns that all files of a manifest have.

    Raises:
        InputError: a column is missing, has the wrong type, or is another one in another file.
    """
    first: Columns | None = None
    for info, footer in zip(found, footers, strict=True):
        columns = _columns_of(footer.schema.to_arrow_schema(), info.uri, id_column, keep)
        first = first or columns
        for name in ("uri", "image"):
            if getattr(columns, name) != getattr(first, name):
                raise InputError(
                    f"the files of the manifest disagree: column {name} is in one of {redact_uri(found[0].uri)} "
                    f"and {redact_uri(info.uri)} only"
                )
        for ours, theirs in zip(columns.kept, first.kept, strict=True):
            if ours.type != theirs.type:
                raise InputError(
                    f"the files of the manifest disagree: column {ours.name} is {theirs.type} in "
                    f"{redact_uri(found[0].uri)} and {ours.type} in {redact_uri(info.uri)}"
                )
    assert first is not None
    return first


def _columns_of(schema: pa.Schema, uri: str, id_column: str, keep: Sequence[str]) -> Columns:
    def typed(name: str, is_right: bool, wanted: str, remedy: str) -> None:
        if not is_right:
            raise InputError(
                f"{redact_uri(uri)}: column {name} has type {schema.field(name).type}, {wanted} is needed; {remedy}"
            )

    def missing(name: str, remedy: str) -> InputError:
        return InputError(
            f"{redact_uri(uri)}: column {name} is missing; it has {', '.join(schema.names)}; {remedy}"
        )

    if id_column not in schema.names:
        raise missing(id_column, "name the column of unique ids with --id-column")
    typed(id_column, _is_text(schema.field(id_column).type), "string", "cast it when writing the manifest")
    if URI not in schema.names and IMAGE not in schema.names:
        raise missing(f"{URI} or {IMAGE}", "each row needs the address of its picture or the picture itself")
    if URI in schema.names:
        typed(URI, _is_text(schema.field(URI).type), "string", "cast it when writing the manifest")
    if IMAGE in schema.names:
        kind = schema.field(IMAGE).type
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        typed(IMAGE, is_bytes, "binary", "it holds the bytes of the image file")
    for name in keep:
        if name not in schema.names:
            raise missing(name, "--keep names columns of the manifest")
    return Columns(
        item_id=id_column,
        uri=URI if URI in schema.names else None,
        image=IMAGE if IMAGE in schema.names else None,
        kept=tuple(schema.field(name).remove_metadata().with_nullable(True) for name in keep),
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
