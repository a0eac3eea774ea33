"""Tables of a page: columns that know how to write a value, and rows of finished text."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Thing = TypeVar("Thing")
Kind = Literal["number", "word", "prose"]


@dataclass(frozen=True, slots=True)
class Column(Generic[Thing]):
    """A column: its heading, its unit, and what stands in it.

    Numbers stand on the right, words on the left on one line, and prose takes as many lines as it needs.
    """

    heading: str
    write: Callable[[Thing], str]
    unit: str = ""
    kind: Kind = "number"


@dataclass(frozen=True, slots=True)
class Row:
    """Text of a row. `name` heads it, with `detail` below; a marked row stands out."""

    name: str
    detail: str
    cells: tuple[str, ...]
    marked: bool


@dataclass(frozen=True, slots=True)
class Table:
    """What a template needs to show a table: heading, unit and kind of each column, and the rows."""

    caption: str
    headings: tuple[tuple[str, str, Kind], ...]
    rows: tuple[Row, ...]


def make_table(
    caption: str,
    columns: Sequence[Column[Thing]],
    things: Iterable[Thing],
    name: Callable[[Thing], tuple[str, str]],
    is_marked: Callable[[Thing], bool],
) -> Table:
    """A table of things, one a row, named by `name` (and a detail)."""
    return Table(
        caption=caption,
        headings=tuple((column.heading, column.unit, column.kind) for column in columns),
        rows=tuple(
            Row(*name(thing), tuple(column.write(thing) for column in columns), is_marked(thing))
            for thing in things
        ),
    )
