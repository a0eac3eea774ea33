"""Console output of a job: a progress bar on a terminal, log lines elsewhere, and the results.

All output passes through this module. Names in a catalog, a bundle or a store are untrusted: characters that could
move the cursor, reverse the text direction or start a new line are escaped, on terminals and in logs.
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
_MAX_LINE_LENGTH = 8_000


class ProgressSnapshot(Protocol):
    """Progress of a running job."""

    @property
    def rows(self) -> int:
        """Number of processed rows, predicted or failed."""

    @property
    def failures(self) -> Counter[str]:
        """Number of failed rows by reason."""


# Zero-width joiner and non-joiner, which Persian, Indic scripts and emoji require.
_ALLOWED = frozenset("\u200c\u200d")
_ESCAPED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: control, format (including bidirectional), surrogate, and line and paragraph separators."""


def printable(text: str) -> str:
    """Escape control characters, so that the text is a single line without effects on a terminal."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character in _ALLOWED or unicodedata.category(character) not in _ESCAPED_CATEGORIES:
        return character
    code = ord(character)
    # \\u009b instead of \\x9b, because it is also a valid escape in JSON.
    return f"\\u{code:04x}" if 0x7F <= code < 0x100 else character.encode("unicode_escape").decode()


def _truncate(text: str) -> str:
    hidden = len(text) - _MAX_LINE_LENGTH
    return text if hidden <= 0 else f"{text[:_MAX_LINE_LENGTH]}… ({hidden} more characters)"


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


class PlainConsole(Console):
    """A console that prints text literally: without markup, emoji codes or control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape the text of a line or a cell before its width is measured."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape all other output."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(_printable_lines(segment.text), segment.style)


class PlainFormatter(logging.Formatter):
    """Writes a message as one line and indents tracebacks, so that untrusted text cannot imitate a log line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - overrides logging.Formatter
        """Format a message as one line; very long messages are truncated."""
        record.message = printable(_truncate(record.message))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - overrides logging.Formatter
        """Format a traceback with indentation."""
        return self.formatStack(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - overrides logging.Formatter
        """Indent a stack trace."""
        return "\n".join(f"    {printable(_truncate(line))}" for line in stack_info.splitlines())


class _TerminalFormatter(PlainFormatter):
    """Shows the level of warnings and errors only, for terminals."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - overrides logging.Formatter
        """Format a message, with the level of warnings and errors."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + super().formatMessage(record)


def results_console() -> Console:
    """Console for results: stdout, without line wrapping if it is not a terminal."""
    return PlainConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def messages_console() -> Console:
    """Console for progress and log messages: stderr."""
    return PlainConsole(stderr=True)


def set_up_logging(console: Console) -> None:
    """Log to stderr: brief and colored on a terminal, with time and level elsewhere."""
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
    if logging.lastResort is not None:  # warnings of other libraries may contain untrusted names
        logging.lastResort.setFormatter(PlainFormatter("%(message)s"))


@contextmanager
def show_progress(
    get_progress: Callable[[], ProgressSnapshot],
    rows: int,
    console: Console,
    interval_seconds: float,
    title: str = "classify",
) -> Iterator[None]:
    """Show the progress of the code inside the `with` block.

    Args:
        get_progress: Returns the current progress; called from a separate thread.
        rows: Total number of rows.
        console: Console for the output: a bar on a terminal, otherwise log lines.
        interval_seconds: Seconds between log lines.
        title: Text in front of the bar.
    """
    ended = threading.Event()
    if console.is_terminal:
        thread = threading.Thread(target=_bar, args=(get_progress, rows, console, title, ended), daemon=True)
    else:
        thread = threading.Thread(
            target=_lines, args=(get_progress, rows, interval_seconds, ended), daemon=True
        )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10.0)


def _observe(get_progress: Callable[[], ProgressSnapshot]) -> ProgressSnapshot | None:
    try:
        return get_progress()
    except Exception as error:  # noqa: BLE001 - progress output must not stop the job
        _logger.debug("progress is unavailable: %s", error)
        return None


def _bar(
    get_progress: Callable[[], ProgressSnapshot],
    rows: int,
    console: Console,
    title: str,
    ended: threading.Event,
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
        meter = _RateMeter()
        while not ended.wait(_BAR_SECONDS):
            if (snapshot := _observe(get_progress)) is not None:
                rate = meter.rate(snapshot.rows)
                progress.update(
                    task,
                    completed=snapshot.rows,
                    rate=f"{rate:.1f}" if rate else "-",
                    failed=_failed(snapshot),
                )


def _lines(
    get_progress: Callable[[], ProgressSnapshot],
    rows: int,
    interval_seconds: float,
    ended: threading.Event,
) -> None:
    meter = _RateMeter()
    while not ended.wait(interval_seconds):
        if (snapshot := _observe(get_progress)) is not None:
            _logger.info(_line(snapshot, rows, meter.rate(snapshot.rows)))


def _line(snapshot: ProgressSnapshot, rows: int, rate: float) -> str:
    if not snapshot.rows:
        return f"0 of {rows} rows, workers are starting"
    parts = [f"{snapshot.rows} of {rows} rows"]
    if rate:
        parts += [f"{rate:.1f} images/s", f"{(rows - snapshot.rows) / rate:.0f} s left"]
    if snapshot.failures:
        parts.append(_failed(snapshot))
    return ", ".join(parts)


class _RateMeter:
    """Rows per second since the first row, without startup."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def rate(self, rows: int) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, rows) if rows else None
            return 0.0
        started, before = self._first
        return (rows - before) / (now - started) if now > started else 0.0


def _failed(snapshot: ProgressSnapshot) -> str:
    return " ".join(f"{reason}={count}" for reason, count in snapshot.failures.most_common(4))
