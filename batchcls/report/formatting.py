"""Formats numbers and strings for report pages. Escaping is left to the templates."""

from batchcls.report.run_page_data import Text
from batchcls.schema import NO_LABEL_TEXT

MAX_TEXT_LENGTH = 56
"""Maximum number of characters of an ID or a label on a page."""

_TIME_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def share(part: float, whole: float) -> str:
    """A fraction as a percentage, such as `82.3%`.

    Values near 0% and 100% get two decimals and are never rounded to 0% or 100%.
    """
    if whole == 0:
        return "-"
    value = 100 * part / whole
    digits = 2 if 0 < value < 1 or 99 < value < 100 else 1
    if 0 < value < 0.01:
        return "< 0.01%"
    if 99.99 < value < 100:
        return "> 99.99%"
    return f"{value:.{digits}f}%"


def percentage_points(now: float, before: float) -> str:
    """The signed difference of two fractions (0..1) in percentage points, such as `+0.35`."""
    value = 100 * (now - before)
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if abs(value) >= 0.005 else "0.00"


def difference(now: float, before: float) -> str:
    """The signed difference of two counts, such as `+1,204`."""
    return (
        f"{now - before:+,.0f}".replace("-", "\N{MINUS SIGN}")
        if round(now - before)
        else "\N{PLUS-MINUS SIGN}0"
    )


def duration(seconds: float) -> str:
    """A duration in its two largest units, such as `3 h 12 min` or `41 s`."""
    rest = round(seconds)
    if rest < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    parts: list[str] = []
    for unit, size in (*_TIME_UNITS, ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def size(n_bytes: int) -> str:
    """A size in bytes with a decimal unit, such as `412 KB`."""
    value = float(n_bytes)
    for unit in ("bytes", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def rate(per_second: float) -> str:
    """A rate per second with three significant digits, or all integer digits."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def count(number: int, thing: str) -> str:
    """A count with its noun, such as `1 row` or `2,000 rows`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def display_text(text: Text, longest: int = MAX_TEXT_LENGTH) -> str:
    """A catalog string on one line: unprintable characters are replaced, and long strings are truncated."""
    if text.start is None:
        return "(null)"
    if text.length == 0:
        return "(empty)"
    if text.length <= longest:
        return printable(text.start)
    cut = printable(text.start[: longest - 1]) + "\N{HORIZONTAL ELLIPSIS}"
    return cut if text.length <= len(text.start) else f"{cut} ({text.length:,} characters)"


def display_label(label: str | None) -> str:
    """A label in the same format; None stands for a prediction below its threshold."""
    return NO_LABEL_TEXT if label is None else display_text(Text(label, len(label)))


def printable(text: str) -> str:
    """Replace line breaks, control characters and bidirectional marks by a visible character."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
