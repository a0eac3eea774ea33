"""How every job starts and ends: arguments, logging, one line for an error, an exit code."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from rich.console import Console

from batchcls.cli.arguments import add_settings, parser_for, read_settings
from batchcls.cli.console import messages_console, set_up_logging
from batchcls.errors import BatchclsError, ExitCode, InputError

_logger = logging.getLogger("batchcls")

Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Command(Generic[Settings]):
    """One thing a job can do: its settings, the function that does it, and examples for --help."""

    name: str
    settings: type[Settings]
    action: Callable[[Settings, Console], ExitCode]
    examples: str
    positional: tuple[str, ...] = ()


def run(job: str, commands: Sequence[Command[Any]], arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, do what they ask, and return the exit code.

    A job of one command has its flags directly; with several, the first word chooses.
    """
    console = messages_console()
    set_up_logging(console)
    try:
        command, settings = _parse(job, commands, arguments)
        return command.action(settings, console)
    except BatchclsError as error:
        if error.exit_code == ExitCode.UNEXPECTED:
            _logger.exception("where it came from:")
        _logger.error("%s", error)  # noqa: TRY400 - the last line is the one for people
        return error.exit_code
    except KeyboardInterrupt:
        _logger.error("interrupted")  # noqa: TRY400
        return ExitCode.INTERRUPTED
    except Exception:
        _logger.exception("unexpected error; this is a fault of batchcls or of something below it")
        return ExitCode.UNEXPECTED


def main(job: str, commands: Sequence[Command[Any]]) -> None:
    """End the process with the job's exit code, at once.

    Threads of Arrow may still wait for a store that has failed, and the interpreter's own end would wait for
    them: four of six tries hung in it (docs/measurements).
    """
    exit_code = run(job, commands)
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where nobody reads the output any more
        os._exit(exit_code)


def _parse(
    job: str, commands: Sequence[Command[Any]], arguments: Sequence[str] | None
) -> tuple[Command[Any], BaseModel]:
    prog = f"python -m batchcls.jobs.{job}"
    if len(commands) == 1:
        (command,) = commands
        parser = parser_for(prog, command.settings.__doc__ or "", command.examples)
        add_settings(parser, command.settings, command.positional)
        return command, read_settings(command.settings, parser.parse_args(arguments))
    by_name = {command.name: command for command in commands}
    parser = parser_for(prog, "", "\n".join(command.examples for command in commands))
    choices = parser.add_subparsers(dest="command", metavar="|".join(by_name))
    for command in commands:
        help_text = (command.settings.__doc__ or "").partition("\n")[0]
        child = choices.add_parser(
            command.name,
            help=help_text,
            description=command.settings.__doc__,
            epilog=command.examples,
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        add_settings(child, command.settings, command.positional)
    namespace = parser.parse_args(arguments)
    if namespace.command is None:
        raise InputError(f"say what to do: {', '.join(by_name)}; see {prog} --help")
    command = by_name[namespace.command]
    del namespace.command
    return command, read_settings(command.settings, namespace)
