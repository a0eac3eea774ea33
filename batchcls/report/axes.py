"""What all plots have in common: quiet axes, text as text, and the way from matplotlib into a page."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from batchcls.report.theme import MUTED, RULE, inline_svg

FONT_SIZE = 9.5
"""Points, of a picture that fills the width of a phone."""


@contextmanager
def drawing(prefix: str) -> Iterator[None]:
    """Inside of it pictures are drawn alike on every machine; `prefix` is that of `to_markup`."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": FONT_SIZE}):
        yield


def style_axes(axes: Axes) -> None:
    """A thin grid, muted text, nothing behind, and one line at the bottom."""
    axes.tick_params(colors=MUTED, length=0, pad=6)
    axes.grid(axis="both", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def to_markup(figure: Figure, prefix: str, title: str, hints: Mapping[str, str]) -> Markup:
    """A drawn figure as inline SVG in the page's colours; see `theme.inline_svg`."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return inline_svg(file.getvalue().decode(), prefix, title, hints)
