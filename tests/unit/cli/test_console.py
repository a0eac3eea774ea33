"""What leaves the program as text: nothing that others have written moves a cursor or begins a line of its own."""

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from batchcls.cli import console as module
from batchcls.cli.app import Command, run
from batchcls.cli.comparison_tables import comparison_progress
from batchcls.cli.console import PlainConsole, messages_console, printable, results_console, set_up_logging
from batchcls.cli.tables import gates_table
from batchcls.errors import ExitCode, InputError
from batchcls.jobs import bundle, classify, compare, evaluate, finetune, manifest, runs
from batchcls.runs.gates import GateResult

NAME = "a\x1b[31mred\x1b]0;title\x07\x9b2J\nERROR forged\r\u2028x\u202egnp\u2066y\ufeff[bold red]b[/] :smile:"
"""What a column, a file or a label may be called: valid UTF-8, without a null byte."""

HOSTILE = f"{NAME} \ud800\x00"
DANGEROUS = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
STYLE = re.compile(r"\x1b\[[\d;]*m")
"""What rich itself writes to color a piece of text."""


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return PlainConsole(file=file, force_terminal=True, width=400, color_system="truecolor"), file


@pytest.fixture
def loggers() -> Iterator[None]:
    """The package's logger as it was before."""
    root = logging.getLogger("batchcls")
    before = root.handlers, root.level, root.propagate
    yield
    root.handlers, root.level, root.propagate = before


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Tasse für Tee, 茶碗　小, نمی‌خواهم, 👩‍🔬", "Tasse für Tee, 茶碗　小, نمی‌خواهم, 👩‍🔬"),
        ("a\tb\nc\r\x1b[2J\x00", "a\\tb\\nc\\r\\x1b[2J\\x00"),
        ("\x7f\x80\x9b\xad", "\\u007f\\u0080\\u009b\\u00ad"),
        ("\u202e\u2066\u200f\u061c\ufeff\u2028\u2029", "\\u202e\\u2066\\u200f\\u061c\\ufeff\\u2028\\u2029"),
        ("\ud800\udcff", "\\ud800\\udcff"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_text_is_one_line_that_does_nothing(text: str, shown: str):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_everything_that_a_console_shows_is_only_text():
    console, file = terminal()
    table = Table(HOSTILE, "column", title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE), style="bold")
    console.print(HOSTILE)
    console.print(f"bundle: {HOSTILE}", style="red")
    console.print(table)
    console.print(gates_table([GateResult("rows", False, 1.0, 2.0, HOSTILE)]))
    console.print_json(data={"label": HOSTILE, HOSTILE: "\x9b\u202e"})
    said = file.getvalue()
    assert "\x1b[1m" in said  # its own styles are there
    said = STYLE.sub("", said)
    assert not DANGEROUS.search(said), DANGEROUS.search(said)
    assert "[bold red]b[/] :smile:" in said
    assert not any(line.startswith("ERROR") for line in said.splitlines())


def test_what_is_printed_as_json_stays_json():
    console, file = terminal()
    console.print_json(data={"label": HOSTILE})
    assert json.loads(STYLE.sub("", file.getvalue())) == {"label": HOSTILE}


def test_cells_with_escapes_stand_in_line_with_others():
    console, file = terminal()
    table = Table(box=None, pad_edge=False)
    for name in ("a", "b"):
        table.add_column(name)
    table.add_row("\x1b[2J", "|")
    table.add_row("short", "|")
    console.print(table)
    first, second = STYLE.sub("", file.getvalue()).splitlines()[1:]
    assert first.index("|") == second.index("|")


def test_a_progress_bar_shows_what_it_is_told_as_text():
    console, file = terminal()
    with comparison_progress(console, 2) as begin:
        begin(HOSTILE)  # type: ignore[arg-type]
        begin("[bold red]b[/] :smile:")  # type: ignore[arg-type]
        begin(HOSTILE)  # type: ignore[arg-type]
    said = file.getvalue()
    assert "\\x1b[31mred" in said
    assert "\x1b[31mred" not in said
    assert "\x1b]0;" not in said


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.usefixtures("loggers")
def test_a_message_is_one_line_and_a_traceback_is_indented(
    is_terminal: bool, capfd: pytest.CaptureFixture[str]
):
    console, file = terminal()
    set_up_logging(console if is_terminal else messages_console())
    logger = logging.getLogger("batchcls.test")
    logger.warning("column %s is missing", HOSTILE)
    try:
        raise ValueError(f"from elsewhere: {HOSTILE}")
    except ValueError:
        logger.exception("where it came from:")
    said = STYLE.sub("", file.getvalue()) if is_terminal else capfd.readouterr().err
    assert isinstance(logging.getLogger("batchcls").handlers[0], RichHandler) is is_terminal
    assert not DANGEROUS.search(said), said
    assert "column a\\x1b[31mred" in said
    lines = [line.rstrip() for line in said.splitlines()]
    assert not any(line.startswith("ERROR forged") for line in lines)
    begin = r"(\[.*\])? *" if is_terminal else r"\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR) "
    (traceback,) = (place for place, line in enumerate(lines) if "Traceback" in line)
    messages = lines[:traceback]
    assert [re.match(begin, line) is not None for line in messages] == [True, True]
    assert all(line.startswith("    ") for line in lines[traceback:] if line)


@pytest.mark.usefixtures("loggers")
def test_warnings_of_other_libraries_are_text_too(capfd: pytest.CaptureFixture[str]):
    set_up_logging(messages_console())
    handler = logging.lastResort
    assert handler is not None
    handler.emit(logging.LogRecord("other", logging.WARNING, "x.py", 1, "bad %s", (HOSTILE,), None))
    assert not DANGEROUS.search(capfd.readouterr().err.rstrip("\n"))


@pytest.mark.usefixtures("loggers")
def test_a_message_with_megabytes_in_it_is_cut(capfd: pytest.CaptureFixture[str]):
    set_up_logging(messages_console())
    logging.getLogger("batchcls.test").error("no such label: %s; add it", "x" * 2**20)
    said = capfd.readouterr().err
    assert len(said) < 10_000
    assert "more characters)" in said


ALL = {"bundle": bundle, "classify": classify, "compare": compare, "evaluate": evaluate} | {
    "finetune": finetune,
    "manifest": manifest,
    "runs": runs,
}
EVERY_COMMAND = [(job, command) for job, jobs in ALL.items() for command in jobs.COMMANDS]


@pytest.mark.parametrize(("job", "command"), EVERY_COMMAND, ids=lambda value: getattr(value, "name", value))
@pytest.mark.usefixtures("loggers")
def test_every_command_repeats_what_it_was_given_as_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], job: str, command: Command
):
    """Flags, values, places, what a person's mistake is, and an unexpected error out of the command's depth."""
    words = [command.name] if len(ALL[job].COMMANDS) > 1 else []
    hostile = NAME

    def act(settings: object, console: Console) -> ExitCode:
        results_console().print(f"results: {hostile}")
        console.print(hostile)
        raise InputError(hostile)

    def break_down(settings: object, console: Console) -> ExitCode:
        raise RuntimeError(hostile)

    place = [str(tmp_path / "x")] * len(command.positional)
    required = [
        part
        for name, field in command.settings.model_fields.items()
        if field.is_required() and name not in command.positional
        for part in (f"--{name.replace('_', '-')}", hostile)
    ]
    required += ["--older-than-days", "1"] if command.name == "prune" else []
    for action, code in ((act, 2), (break_down, 1), (None, 2)):
        fake = [
            Command(one.name, one.settings, action or one.action, one.examples, one.positional)
            for one in ALL[job].COMMANDS
        ]
        arguments = [*words, *place, *required] if action else [*words, f"--{hostile}", hostile]
        found = run(job, fake, arguments)
        assert found == code or action is None
    said = capfd.readouterr()
    for text in (said.out, said.err):
        assert not DANGEROUS.search(text), DANGEROUS.search(text)
        assert not re.search(r"^ERROR forged", text, re.MULTILINE)
    assert "\\x1b[31mred" in said.err


def test_names_of_columns_and_files_are_shown_as_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / f"{NAME.partition('[bold')[0].replace('[', '')}.parquet"
    pq.write_table(pa.table({NAME: ["a"], "uri": ["x"]}), path)
    for arguments in (["check", str(path)], ["check", str(tmp_path)], ["check", str(path), "--keep", NAME]):
        assert run("manifest", manifest.COMMANDS, arguments) == 2
    assert run("manifest", manifest.COMMANDS, ["check", str(path), "--id-column", NAME]) == 0
    said = capfd.readouterr()
    assert not DANGEROUS.search(said.out + said.err)
    assert len(said.err.splitlines()) == 3


def test_reasons_of_progress_are_the_closed_list(monkeypatch: pytest.MonkeyPatch):
    class Seen:
        rows, failures = 5, Counter({"not_found": 2})

    assert "not_found=2" in module._line(Seen(), 10, 1.0)
