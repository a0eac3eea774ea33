"""Renders self-contained HTML report pages from templates with automatic escaping, and builds their tables."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Generic, Literal, TypeVar
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

_SEPARATORS = re.compile(r"([_/:])(?=\w)")


def render_page(template: str, **values: object) -> str:
    """Fill a template of `templates/`.

    Args:
        template: file name; a template that extends page.html renders a complete page.
        values: template variables. Text is escaped; only `markupsafe.Markup` is inserted unchanged.

    Raises:
        jinja2.UndefinedError: the template uses an undefined variable.
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
    """Escaped text with line break opportunities after the separators of long names."""
    return Markup(_SEPARATORS.sub(r"\1<wbr>", str(escape(text))))


Item = TypeVar("Item")
Kind = Literal["number", "word", "prose"]


@dataclass(frozen=True, slots=True)
class Column(Generic[Item]):
    """A column with its heading, its unit and a function that formats a cell.

    Numbers are aligned right, words are aligned left on one line, and prose wraps.
    """

    heading: str
    write: Callable[[Item], str]
    unit: str = ""
    kind: Kind = "number"


@dataclass(frozen=True, slots=True)
class Row:
    """Text of a row: its header `name` with `detail` below, and its cells; marked rows are highlighted."""

    name: str
    detail: str
    cells: tuple[str, ...]
    marked: bool


@dataclass(frozen=True, slots=True)
class Table:
    """A table as templates show it: heading, unit and kind of each column, and the rows."""

    caption: str
    headings: tuple[tuple[str, str, Kind], ...]
    rows: tuple[Row, ...]


def make_table(
    caption: str,
    columns: Sequence[Column[Item]],
    items: Iterable[Item],
    name: Callable[[Item], tuple[str, str]],
    is_marked: Callable[[Item], bool],
) -> Table:
    """Build a table with one row per item; `name` returns the row header and its detail."""
    return Table(
        caption=caption,
        headings=tuple((column.heading, column.unit, column.kind) for column in columns),
        rows=tuple(
            Row(*name(item), tuple(column.write(item) for column in columns), is_marked(item))
            for item in items
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
    """Convert an SVG document into an inline element.

    Args:
        svg: matplotlib output with text elements.
        prefix: prefix of all IDs, which makes them unique within a page.
        title: accessible description.
        hints: tooltip by element ID.
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
    """Remove namespaces, indentation, fonts and colors, which HTML and the page's style replace."""
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
        return _MARKER.sub(lambda match: CSS_VARIABLES[match.group()], _FONT_FAMILY.sub("", value))
    return value
