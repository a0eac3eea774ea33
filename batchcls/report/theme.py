"""A picture becomes a part of a page: an SVG whose colours and fonts are the page's.

A plot is drawn in the marker colours below. They are turned into the CSS variables of
templates/page.css here and nowhere else, so that one picture is right in light, in dark and in print.
"""

import re
from collections.abc import Mapping
from xml.etree import ElementTree

from markupsafe import Markup

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
"""Marker colour -> the variable of the page that replaces it."""

_MARKER = re.compile("|".join(CSS_VARIABLES))
_FONT_FAMILY = re.compile(r"font-family: [^;]+;?\s*")
_REFERENCE = re.compile(r"#(?=[\w.-])")
_DROPPED = ("metadata", "style")


def inline_svg(svg: str, prefix: str, title: str, hints: Mapping[str, str]) -> Markup:
    """An SVG document as an element for the middle of a page.

    Args:
        svg: as matplotlib writes it, text as text.
        prefix: goes in front of all ids, since those of two pictures are the same.
        title: what the picture shows, for those who do not see it.
        hints: id in the picture -> what to show when a pointer rests on that part.
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
    """Leave what HTML and the page's style need: no namespaces, no indentation, no fonts and colours."""
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
