"""Determine the columns of a manifest, check that its files agree, and reject unsupported types."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchcls.errors import InputError
from batchcls.manifest.column_types import (
    IMAGE_TYPES,
    common_type,
    holds_text,
    is_image,
    is_text,
    is_version,
    null_as_string,
    plain_type,
    unsupported_type_reason,
)
from batchcls.schema import IMAGE, ITEM_ID, SOURCE_VERSION, URI, VERSION
from batchcls.storage.uris import redact_uri

_NAMED_COLUMNS = 20


@dataclass(frozen=True, slots=True)
class Columns:
    """Which of the manifest's columns plays which part; None where the manifest has none.

    `version` names the state of an image's content: where it has not changed, the image has not either.
    `kept` are the columns that pass through, with the plain types that they are read as.
    """

    item_id: str
    uri: str | None
    image: str | None
    kept: tuple[pa.Field, ...]
    version: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns that a load task reads, no others."""
        parts = (self.item_id, self.uri, self.image, self.version, *(field.name for field in self.kept))
        return list(dict.fromkeys(name for name in parts if name is not None))

    @property
    def texts(self) -> dict[str, str]:
        """Columns in which text must be valid UTF-8: names in the reader's tables -> names in the manifest.

        The uri is not among them: it is a matter of its row.
        """
        found = {ITEM_ID: self.item_id} | ({SOURCE_VERSION: self.version} if self.version else {})
        return found | {field.name: field.name for field in self.kept if holds_text(field.type)}


def resolve_columns(
    schema: pa.Schema, uri: str, id_column: str, keep: Sequence[str], *, optional: bool
) -> Columns:
    """Find the columns of one file that a job uses. Types of kept columns may still hold null, see `agree`.

    Args:
        schema: of all the file's columns.
        uri: of the file, for messages.
        id_column: the column with the unique ids.
        keep: columns that pass through.
        optional: a kept column may be missing.

    Raises:
        InputError: a column is missing, repeated, or of a type that cannot be read.
    """
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise InputError(
            f"{redact_uri(uri)}: column {repeated[0]} is there {schema.names.count(repeated[0])} times, and nobody "
            "can say which is meant; give each column a name of its own"
        )

    def need(name: str, is_right: Callable[[pa.DataType], bool], wanted: str, remedy: str) -> None:
        kind = schema.field(name).type
        if not is_right(kind):
            raise InputError(
                f"{redact_uri(uri)}: column {name} has type {kind}, {wanted} is needed; {remedy}"
            )

    def missing(name: str, remedy: str) -> InputError:
        return InputError(
            f"{redact_uri(uri)}: column {name} is missing; it has {summarize_names(schema.names)}; {remedy}"
        )

    if id_column not in schema.names:
        raise missing(id_column, "name the column of unique ids with --id-column")
    need(id_column, is_text, "string", "cast it when writing the manifest")
    if URI not in schema.names and IMAGE not in schema.names:
        raise missing(f"{URI} or {IMAGE}", "each row needs the address of its image or the image itself")
    if URI in schema.names:
        need(URI, is_text, "string", "cast it when writing the manifest")
    if IMAGE in schema.names:
        need(IMAGE, is_image, IMAGE_TYPES, "it holds the bytes of the image file")
    if VERSION in schema.names:
        need(VERSION, is_version, "string or a whole number", "it names the state of the image's content")
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
    """A kept column as it is read. Raises InputError where it has no plain type."""
    plain = plain_type(field.type)
    if plain is not None and not (field.name == IMAGE and pa.types.is_struct(plain)):
        return pa.field(field.name, plain)
    raise InputError(
        f"{redact_uri(uri)}: column {field.name} has type {field.type}, which cannot be kept: "
        f"{unsupported_type_reason(field.type)}; cast it when writing the manifest, or leave it out"
    )


def merge_columns(found: Sequence[tuple[str, Columns]]) -> Columns:
    """The columns that all files of a manifest have, each of one type.

    Args:
        found: uri and columns of each file, at least one.

    Raises:
        InputError: a column is in some of the files only, or its types have none in common.
    """
    first_uri, common = found[0]
    for uri, columns in found[1:]:
        for name, ours, theirs in _roles(columns, common):
            if (ours is None) != (theirs is None):
                raise InputError(
                    f"the files of the manifest disagree: column {name} is in one of {redact_uri(first_uri)} "
                    f"and {redact_uri(uri)} only"
                )
        kept = []
        for ours, theirs in zip(columns.kept, common.kept, strict=True):
            kind = common_type(ours.type, theirs.type)
            if kind is None:
                raise InputError(
                    f"the files of the manifest disagree: column {ours.name} is {theirs.type} in "
                    f"{redact_uri(first_uri)} and {ours.type} in {redact_uri(uri)}; write it as one type"
                )
            kept.append(pa.field(ours.name, kind))
        common = replace(common, kept=tuple(kept))
    return replace(
        common, kept=tuple(pa.field(field.name, null_as_string(field.type)) for field in common.kept)
    )


def _roles(ours: Columns, theirs: Columns) -> Iterable[tuple[str, object, object]]:
    for name in (URI, IMAGE, VERSION):
        yield name, getattr(ours, name), getattr(theirs, name)
    by_name = [{field.name: field for field in columns.kept} for columns in (ours, theirs)]
    for name in dict.fromkeys([*by_name[1], *by_name[0]]):
        yield name, by_name[0].get(name), by_name[1].get(name)


def summarize_names(names: Sequence[str]) -> str:
    """The first twenty names of columns, and how many more there are."""
    more = f" and {len(names) - _NAMED_COLUMNS} more" if len(names) > _NAMED_COLUMNS else ""
    return ", ".join(names[:_NAMED_COLUMNS]) + more
