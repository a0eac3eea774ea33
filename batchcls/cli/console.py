"""What a person sees of a job: a progress bar on a terminal, log lines elsewhere, a closing summary.

All text leaves the program here. Names in a catalog, a bundle or a store are written by others: what could
move a cursor, turn the order of letters or begin a line of its own is shown escaped, on terminals and in logs.
"""

import logging
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

_logger = logging.getLogger(__name__)
_BAR_SECONDS = 0.5
_LONGEST_LINE = 8_000


class ProgressSnapshot(Protocol):
    """What a job can say of itself while it runs."""

    @property
    def rows(self) -> int:
        """Rows answered or failed so far."""

    @property
    def failures(self) -> Counter[str]:
        """Failed rows so far, by reason."""


# Letters of Persian and of Indian scripts, and emoji, are joined and held apart by these two.
_HARMLESS = frozenset("\u200c\u200d")
_DANGEROUS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls, formats (among them bidirectional ones), surrogates, ends of lines."""


def printable(text: str) -> str:
    """Text as one line that does nothing to a terminal: control characters are shown as escapes."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character in _HARMLESS or unicodedata.category(character) not in _DANGEROUS:
        return character
    code = ord(character)
    # Not \\x9b but \\u009b, which JSON knows too.
    return f"\\u{code:04x}" if 0x7F <= code < 0x100 else character.encode("unicode_escape").decode()


def _cut(text: str) -> str:
    left = len(text) - _LONGEST_LINE
    return text if left <= 0 else f"{text[:_LONGEST_LINE]}… ({left} more characters)"


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


class PlainConsole(Console):
    """A console to which text is only text: no markup, no emoji by name, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a line or a cell, before it is measured."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever else is shown, in the pieces that go to the terminal."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(_printable_lines(segment.text), segment.style)


class PlainFormatter(logging.Formatter):
    """A message is one line, and the lines of a traceback are indented, so that neither can pass for a message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - a name of logging's
        """The line of a message; of one that repeats somebody's megabytes, the beginning."""
        record.message = printable(_cut(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - a name of logging's
        """A traceback."""
        return self.formatStack(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - a name of logging's
        """A stack, or the text of a traceback."""
        return "\n".join(f"    {printable(_cut(line))}" for line in stack_info.splitlines())


class _TerminalFormatter(PlainFormatter):
    """On a terminal only warnings and errors say what they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - a name of logging's
        """The line of a message."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().formatMessage(record)


def results_console() -> Console:
    """Where a job prints its results: stdout, unfolded where it is no terminal."""
    return PlainConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def messages_console() -> Console:
    """Where a job shows its progress and its log: stderr."""
    return PlainConsole(stderr=True)


def set_up_logging(console: Console) -> None:
    """Log to stderr: short and colored on a terminal, with time and level elsewhere."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, show_level=False, markup=False
        )
        handler.setFormatter(_TerminalFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("batchcls")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
    if logging.lastResort is not None:  # warnings of other libraries, which name what they read
        logging.lastResort.setFormatter(PlainFormatter("%(message)s"))


@contextmanager
def watching(
    look: Callable[[], ProgressSnapshot],
    rows: int,
    console: Console,
    interval_seconds: float,
    title: str = "classify",
) -> Iterator[None]:
    """Show the progress of what runs inside the block.

    Args:
        look: how far it is; called from a thread of its own.
        rows: how many rows there are in all.
        console: where to; a terminal gets a bar, anything else a log line every `interval_seconds`.
        interval_seconds: seconds between log lines.
        title: what is being done, in front of the bar.
    """
    ended = threading.Event()
    if console.is_terminal:
        thread = threading.Thread(target=_bar, args=(look, rows, console, title, ended), daemon=True)
    else:
        thread = threading.Thread(target=_lines, args=(look, rows, interval_seconds, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10.0)


def _observe(look: Callable[[], ProgressSnapshot]) -> ProgressSnapshot | None:
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - watching must not end what is watched
        _logger.debug("no progress figures this time: %s", error)
        return None


def _bar(
    look: Callable[[], ProgressSnapshot], rows: int, console: Console, title: str, ended: threading.Event
) -> None:
    columns = (
        TextColumn(title, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("rows", total=rows, rate="-", failed="")
        meter = _Meter()
        while not ended.wait(_BAR_SECONDS):
            if (seen := _observe(look)) is not None:
                rate = meter.rate(seen.rows)
                progress.update(
                    task, completed=seen.rows, rate=f"{rate:.1f}" if rate else "-", failed=_failed(seen)
                )


def _lines(
    look: Callable[[], ProgressSnapshot], rows: int, interval_seconds: float, ended: threading.Event
) -> None:
    meter = _Meter()
    while not ended.wait(interval_seconds):
        if (seen := _observe(look)) is not None:
            _logger.info(_line(seen, rows, meter.rate(seen.rows)))


def _line(seen: ProgressSnapshot, rows: int, rate: float) -> str:
    if not seen.rows:
        return f"0 of {rows} rows, workers are starting"
    parts = [f"{seen.rows} of {rows} rows"]
    if rate:
        parts += [f"{rate:.1f} images/s", f"{(rows - seen.rows) / rate:.0f} s left"]
    if seen.failures:
        parts.append(_failed(seen))
    return ", ".join(parts)


class _Meter:
    """Rows per second since the first row was seen, start-up left out."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, rows: int) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, rows) if rows else None
            return 0.0
        started, before = self._first
        return (rows - before) / (now - started) if now > started else 0.0


def _failed(seen: ProgressSnapshot) -> str:
    return " ".join(f"{reason}={count}" for reason, count in seen.failures.most_common(4))
