"""The frame of every page: one HTML file that needs nothing else, from templates that escape what they show."""

import re
from functools import cache

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
