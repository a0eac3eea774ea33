"""The frame of every page: one HTML file that needs nothing else, from templates that escape what they show."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Literal, TypeVar
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

_JOINTS = re.compile(r"([_/:])(?=\w)")


def render_page(template: str, **values: object) -> str:
    """Fill a template of `templates/`.

    Args:
        template: its file name; one that extends page.html gives a whole page.
        values: what it shows. Text is escaped; only `markupsafe.Markup` goes in as it is.

    Raises:
        jinja2.UndefinedError: the template asks for something that is not there.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batchcls.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment


def breakable(text: str) -> Markup:
    """Escaped text that may go on in another line at a joint of the kinds that long names have."""
    return Markup(_JOINTS.sub(r"\1<wbr>", str(escape(text))))


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


INK = "#010001"
MUTED = "#010002"
RULE = "#010003"
ACCENT = "#010004"
GROUND = "#010005"

CSS_VARIABLES: Mapping[str, str] = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    GROUND: "var(--ground)",
}
"""Marker color -> the variable of the page that replaces it."""

_MARKER = re.compile("|".join(CSS_VARIABLES))
_FONT_FAMILY = re.compile(r"font-family: [^;]+;?\s*")
_REFERENCE = re.compile(r"#(?=[\w.-])")
_DROPPED = ("metadata", "style")


def inline_svg(svg: str, prefix: str, title: str, hints: Mapping[str, str]) -> Markup:
    """An SVG document as an element for the middle of a page.

    Args:
        svg: as matplotlib writes it, text as text.
        prefix: goes in front of all ids, since those of two images are the same.
        title: what the image shows, for those who do not see it.
        hints: id in the image -> what to show when a pointer rests on that part.
    """
    root = ElementTree.fromstring(svg)
    for node in root.iter():
        _clean(node, prefix)
    for identifier, hint in hints.items():
        for node in root.iterfind(f".//*[@id='{prefix}{identifier}']"):
            ElementTree.SubElement(node, "title").text = hint
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _clean(node: ElementTree.Element, prefix: str) -> None:
    """Leave what HTML and the page's style need: no namespaces, no indentation, no fonts and colors."""
    for child in [child for child in node if child.tag.rpartition("}")[2] in _DROPPED]:
        node.remove(child)
    node.tag = node.tag.rpartition("}")[2]
    node.attrib = {
        name.rpartition("}")[2]: _rewrite(name.rpartition("}")[2], value, prefix)
        for name, value in node.attrib.items()
    }
    node.tail = None
    node.text = (node.text or "").strip() or None


def _rewrite(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}{value}"
    if name in ("href", "clip-path"):
        return _REFERENCE.sub(f"#{prefix}", value)
    if name == "style":
        return _MARKER.sub(lambda found: CSS_VARIABLES[found.group()], _FONT_FAMILY.sub("", value))
    return value
