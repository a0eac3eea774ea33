"""Figures and strings of a run as people read them. Escaping is the templates' own."""

from batchcls.report.run_page_data import Text
from batchcls.schema import NO_LABEL

LONGEST = 56
"""Characters of an id or a label that a page shows."""

_SECONDS_OF = (("d", 86_400), ("h", 3_600), ("min", 60))


def share(part: float, whole: float) -> str:
    """A part of a whole, as in `82.3 %`; small ones with two decimals, and never 0 or 100 by rounding."""
    if whole == 0:
        return "-"
    value = 100 * part / whole
    digits = 2 if 0 < value < 1 or 99 < value < 100 else 1
    if 0 < value < 0.01:
        return "< 0.01 %"
    if 99.99 < value < 100:
        return "> 99.99 %"
    return f"{value:.{digits}f} %"


def points(now: float, before: float) -> str:
    """The difference of two shares (0..1) in percentage points, with its sign: `+0.35`."""
    value = 100 * (now - before)
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if abs(value) >= 0.005 else "0.00"


def difference(now: float, before: float) -> str:
    """How many more or fewer than before, with a sign: `+1,204`."""
    return (
        f"{now - before:+,.0f}".replace("-", "\N{MINUS SIGN}")
        if round(now - before)
        else "\N{PLUS-MINUS SIGN}0"
    )


def duration(seconds: float) -> str:
    """A time in its two largest units: `3 h 12 min`, `41 s`."""
    rest = round(seconds)
    if rest < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    parts: list[str] = []
    for unit, size in (*_SECONDS_OF, ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def size(n_bytes: int) -> str:
    """A number of bytes: `412 KB`."""
    value = float(n_bytes)
    for unit in ("bytes", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def rate(per_second: float) -> str:
    """Something a second, with three digits or all of its whole part."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def count(number: int, thing: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def shown(text: Text, longest: int = LONGEST) -> str:
    """A string of the catalog on one line: what cannot be printed is marked, what is long is cut and counted."""
    if text.start is None:
        return "(null)"
    if text.length == 0:
        return "(empty)"
    if text.length <= longest:
        return printable(text.start)
    cut = printable(text.start[: longest - 1]) + "\N{HORIZONTAL ELLIPSIS}"
    return cut if text.length <= len(text.start) else f"{cut} ({text.length:,} characters)"


def shown_label(label: str | None) -> str:
    """A label, in the same way; None is that of an answer that was not sure enough for one."""
    return NO_LABEL if label is None else shown(Text(label, len(label)))


def printable(text: str) -> str:
    """Line breaks, control characters and marks that turn the direction of writing become a visible sign."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)
