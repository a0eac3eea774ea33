"""Determine the columns of a manifest, check that its files are consistent, and reject unsupported types."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchcls.errors import InputError
from batchcls.manifest.column_types import (
    IMAGE_COLUMN,
    ITEM_ID_COLUMN,
    URI_COLUMN,
    VERSION_COLUMN,
    common_type,
    holds_text,
    null_as_string,
    plain_type,
    unsupported_type_reason,
)
from batchcls.schema import IMAGE, ITEM_ID, SOURCE_VERSION, URI, VERSION
from batchcls.storage.uris import redact_uri

_MAX_LISTED_COLUMNS = 20


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the manifest's columns by their role; None if the manifest has no such column.

    `version` identifies the content of an image: as long as it is unchanged, the image is unchanged.
    `kept` are the columns that are copied to the output, with their plain types.
    """

    item_id: str
    uri: str | None
    image: str | None
    kept: tuple[pa.Field, ...]
    version: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of all columns that a load task reads."""
        parts = (self.item_id, self.uri, self.image, self.version, *(field.name for field in self.kept))
        return list(dict.fromkeys(name for name in parts if name is not None))

    @property
    def texts(self) -> dict[str, str]:
        """Columns whose text must be valid UTF-8: names in the tables of the reader -> names in the manifest.

        The uri is not included, because an invalid uri only fails its row.
        """
        found = {ITEM_ID: self.item_id} | ({SOURCE_VERSION: self.version} if self.version else {})
        return found | {field.name: field.name for field in self.kept if holds_text(field.type)}


def resolve_columns(
    schema: pa.Schema, uri: str, id_column: str, keep: Sequence[str], *, optional: bool
) -> Columns:
    """Find the columns of a file that a job uses. Types of kept columns can still be null, see `merge_columns`.

    Args:
        schema: schema of the file.
        uri: URI of the file, for messages.
        id_column: column with the unique ids.
        keep: columns that are copied to the output.
        optional: whether columns in `keep` may be missing.

    Raises:
        InputError: a column is missing, occurs more than once, or has an unsupported type.
    """
    duplicates = [name for name, count in Counter(schema.names).items() if count > 1]
    if duplicates:
        raise InputError(
            f"{redact_uri(uri)}: column {duplicates[0]} occurs {schema.names.count(duplicates[0])} times; give each "
            "column a unique name"
        )

    def missing(name: str, remedy: str) -> InputError:
        return InputError(
            f"{redact_uri(uri)}: column {name} is missing; it has {summarize_names(schema.names)}; {remedy}"
        )

    if id_column not in schema.names:
        raise missing(id_column, f"name the column of unique ids with {ITEM_ID_COLUMN.flag}")
    if URI not in schema.names and IMAGE not in schema.names:
        raise missing(f"{URI} or {IMAGE}", "each row needs the URI of its image or the image itself")
    named = [(ITEM_ID_COLUMN, id_column)]
    named += [(column, column.name) for column in (URI_COLUMN, IMAGE_COLUMN, VERSION_COLUMN)]
    for column, name in named:
        if name in schema.names:
            column.require_type(schema.field(name).type, f"{redact_uri(uri)}: column {name}")
    kept = []
    for name in keep:
        if name in schema.names:
            kept.append(_kept(schema.field(name), uri))
        elif not optional:
            raise missing(name, "--keep names columns of the manifest")
    return Columns(
        item_id=id_column,
        uri=URI if URI in schema.names else None,
        image=IMAGE if IMAGE in schema.names else None,
        version=VERSION if VERSION in schema.names else None,
        kept=tuple(kept),
    )


def _kept(field: pa.Field, uri: str) -> pa.Field:
    """Return a kept column with its plain type. Raises InputError if it has none."""
    plain = plain_type(field.type)
    if plain is not None and not (field.name == IMAGE and pa.types.is_struct(plain)):
        return pa.field(field.name, plain)
    raise InputError(
        f"{redact_uri(uri)}: column {field.name} has type {field.type}, which cannot be kept: "
        f"{unsupported_type_reason(field.type)}; cast it when writing the manifest, or leave it out"
    )


def merge_columns(found: Sequence[tuple[str, Columns]]) -> Columns:
    """Merge the columns of all files of a manifest, with one type for each kept column.

    Args:
        found: URI and columns of each file, at least one.

    Raises:
        InputError: a column is missing in some of the files, or its types cannot be merged.
    """
    first_uri, common = found[0]
    for uri, columns in found[1:]:
        for name, new, merged in _pairs(columns, common):
            if (new is None) != (merged is None):
                raise InputError(
                    f"the files of the manifest are inconsistent: column {name} exists in only one of "
                    f"{redact_uri(first_uri)} and {redact_uri(uri)}"
                )
        kept = []
        for new, merged in zip(columns.kept, common.kept, strict=True):
            kind = common_type(new.type, merged.type)
            if kind is None:
                raise InputError(
                    f"the files of the manifest are inconsistent: column {new.name} is {merged.type} in "
                    f"{redact_uri(first_uri)} and {new.type} in {redact_uri(uri)}; write it with one type"
                )
            kept.append(pa.field(new.name, kind))
        common = replace(common, kept=tuple(kept))
    return replace(
        common, kept=tuple(pa.field(field.name, null_as_string(field.type)) for field in common.kept)
    )


def _pairs(first: Columns, second: Columns) -> Iterable[tuple[str, object, object]]:
    for name in (URI, IMAGE, VERSION):
        yield name, getattr(first, name), getattr(second, name)
    by_name = [{field.name: field for field in columns.kept} for columns in (first, second)]
    for name in dict.fromkeys([*by_name[1], *by_name[0]]):
        yield name, by_name[0].get(name), by_name[1].get(name)


def summarize_names(names: Sequence[str]) -> str:
    """The first twenty names, and the number of the others."""
    more = f" and {len(names) - _MAX_LISTED_COLUMNS} more" if len(names) > _MAX_LISTED_COLUMNS else ""
    return ", ".join(names[:_MAX_LISTED_COLUMNS]) + more
