"""Tests for console output: untrusted text cannot move the cursor or start a new line."""

import io
import json
import logging
import re
from collections import Counter
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
from batchcls.runs.records import GateResult

NAME = "a\x1b[31mred\x1b]0;title\x07\x9b2J\nERROR forged\r\u2028x\u202egnp\u2066y\ufeff[bold red]b[/] :smile:"
"""A possible name of a column, a file or a label: valid UTF-8 without a null byte."""

HOSTILE = f"{NAME} \ud800\x00"
DANGEROUS = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
STYLE = re.compile(r"\x1b\[[\d;]*m")
"""Escape sequences that rich writes to style text."""


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return PlainConsole(file=file, force_terminal=True, width=400, color_system="truecolor"), file


@pytest.mark.parametrize(
    ("text", "escaped"),
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
def test_escapes_control_characters(text: str, escaped: str):
    assert printable(text) == escaped
    assert printable(escaped) == escaped


def test_console_escapes_all_output():
    console, file = terminal()
    table = Table(HOSTILE, "column", title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE), style="bold")
    console.print(HOSTILE)
    console.print(f"bundle: {HOSTILE}", style="red")
    console.print(table)
    console.print(gates_table([GateResult(gate="rows", value=1.0, limit=2.0, passed=False, message=HOSTILE)]))
    console.print_json(data={"label": HOSTILE, HOSTILE: "\x9b\u202e"})
    output = file.getvalue()
    assert "\x1b[1m" in output  # styles of rich remain
    output = STYLE.sub("", output)
    assert not DANGEROUS.search(output), DANGEROUS.search(output)
    assert "[bold red]b[/] :smile:" in output
    assert not any(line.startswith("ERROR") for line in output.splitlines())


def test_escaped_json_stays_valid():
    console, file = terminal()
    console.print_json(data={"label": HOSTILE})
    assert json.loads(STYLE.sub("", file.getvalue())) == {"label": HOSTILE}


def test_escaped_cells_stay_aligned():
    console, file = terminal()
    table = Table(box=None, pad_edge=False)
    for name in ("a", "b"):
        table.add_column(name)
    table.add_row("\x1b[2J", "|")
    table.add_row("short", "|")
    console.print(table)
    first, second = STYLE.sub("", file.getvalue()).splitlines()[1:]
    assert first.index("|") == second.index("|")


def test_progress_bar_escapes_descriptions():
    console, file = terminal()
    with comparison_progress(console, 2) as on_start:
        on_start(HOSTILE)  # type: ignore[arg-type]
        on_start("[bold red]b[/] :smile:")  # type: ignore[arg-type]
        on_start(HOSTILE)  # type: ignore[arg-type]
    output = file.getvalue()
    assert "\\x1b[31mred" in output
    assert "\x1b[31mred" not in output
    assert "\x1b]0;" not in output


@pytest.mark.parametrize("is_terminal", [False, True])
def test_messages_are_one_line_and_tracebacks_are_indented(
    is_terminal: bool, capfd: pytest.CaptureFixture[str]
):
    console, file = terminal()
    set_up_logging(console if is_terminal else messages_console())
    logger = logging.getLogger("batchcls.test")
    logger.warning("column %s is missing", HOSTILE)
    try:
        raise ValueError(f"from elsewhere: {HOSTILE}")
    except ValueError:
        logger.exception("unexpected error:")
    output = STYLE.sub("", file.getvalue()) if is_terminal else capfd.readouterr().err
    assert isinstance(logging.getLogger("batchcls").handlers[0], RichHandler) is is_terminal
    assert not DANGEROUS.search(output), output
    assert "column a\\x1b[31mred" in output
    lines = [line.rstrip() for line in output.splitlines()]
    assert not any(line.startswith("ERROR forged") for line in lines)
    prefix = r"(\[.*\])? *" if is_terminal else r"\d{4}-\d\d-\d\d [\d:,]+ (WARNING|ERROR) "
    (traceback,) = (index for index, line in enumerate(lines) if "Traceback" in line)
    messages = lines[:traceback]
    assert [re.match(prefix, line) is not None for line in messages] == [True, True]
    assert all(line.startswith("    ") for line in lines[traceback:] if line)


def test_escapes_warnings_of_other_libraries(capfd: pytest.CaptureFixture[str]):
    set_up_logging(messages_console())
    handler = logging.lastResort
    assert handler is not None
    handler.emit(logging.LogRecord("other", logging.WARNING, "x.py", 1, "bad %s", (HOSTILE,), None))
    assert not DANGEROUS.search(capfd.readouterr().err.rstrip("\n"))


def test_truncates_very_long_messages(capfd: pytest.CaptureFixture[str]):
    set_up_logging(messages_console())
    logging.getLogger("batchcls.test").error("no such label: %s; add it", "x" * 2**20)
    output = capfd.readouterr().err
    assert len(output) < 10_000
    assert "more characters)" in output


ALL = {"bundle": bundle, "classify": classify, "compare": compare, "evaluate": evaluate} | {
    "finetune": finetune,
    "manifest": manifest,
    "runs": runs,
}
EVERY_COMMAND = [(job, command) for job, jobs in ALL.items() for command in jobs.COMMANDS]


@pytest.mark.parametrize(("job", "command"), EVERY_COMMAND, ids=lambda value: getattr(value, "name", value))
def test_every_command_escapes_its_arguments_and_errors(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], job: str, command: Command
):
    """Covers flags, values, positional arguments, user errors and unexpected errors."""
    words = [command.name] if len(ALL[job].COMMANDS) > 1 else []
    hostile = NAME

    def raise_input_error(settings: object, console: Console) -> ExitCode:
        results_console().print(f"results: {hostile}")
        console.print(hostile)
        raise InputError(hostile)

    def raise_unexpected_error(settings: object, console: Console) -> ExitCode:
        raise RuntimeError(hostile)

    positional = [str(tmp_path / "x")] * len(command.positional)
    required = [
        part
        for name, field in command.settings.model_fields.items()
        if field.is_required() and name not in command.positional
        for part in (f"--{name.replace('_', '-')}", hostile)
    ]
    required += ["--older-than-days", "1"] if command.name == "prune" else []
    required += ["--manifest", hostile] if command.name == "extend" else []
    for action, code in ((raise_input_error, 2), (raise_unexpected_error, 1), (None, 2)):
        fake = [
            Command(
                original.name,
                original.settings,
                action or original.action,
                original.examples,
                original.positional,
            )
            for original in ALL[job].COMMANDS
        ]
        arguments = [*words, *positional, *required] if action else [*words, f"--{hostile}", hostile]
        exit_code = run(job, fake, arguments)
        assert exit_code == code or action is None
    output = capfd.readouterr()
    for text in (output.out, output.err):
        assert not DANGEROUS.search(text), DANGEROUS.search(text)
        assert not re.search(r"^ERROR forged", text, re.MULTILINE)
    assert "\\x1b[31mred" in output.err


def test_escapes_names_of_columns_and_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path = tmp_path / f"{NAME.partition('[bold')[0].replace('[', '')}.parquet"
    pq.write_table(pa.table({NAME: ["a"], "uri": ["x"]}), path)
    for arguments in (["check", str(path)], ["check", str(tmp_path)], ["check", str(path), "--keep", NAME]):
        assert run("manifest", manifest.COMMANDS, arguments) == 2
    assert run("manifest", manifest.COMMANDS, ["check", str(path), "--id-column", NAME]) == 0
    output = capfd.readouterr()
    assert not DANGEROUS.search(output.out + output.err)
    assert len(output.err.splitlines()) == 3


def test_progress_line_shows_failures_by_reason(monkeypatch: pytest.MonkeyPatch):
    class Snapshot:
        rows, failures = 5, Counter({"not_found": 2})

    assert "not_found=2" in module._line(Snapshot(), 10, 1.0)
