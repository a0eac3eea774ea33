"""Start and end of every job: arguments, logging, one line for an error, an exit code."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from rich.console import Console

from batchcls.cli.arguments import add_settings, parser_for, read_settings
from batchcls.cli.console import messages_console, set_up_logging
from batchcls.errors import BatchclsError, ExitCode, InputError

_logger = logging.getLogger("batchcls")

EXAMPLES = "examples:\n"
"""The heading of the examples of every command."""

Settings = TypeVar("Settings", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Command(Generic[Settings]):
    """A command of a job: its settings, the function that carries it out, and examples for --help."""

    name: str
    settings: type[Settings]
    action: Callable[[Settings, Console], ExitCode]
    examples: str
    positional: tuple[str, ...] = ()


def run(job: str, commands: Sequence[Command[Any]], arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, run the command, and return the exit code.

    A job with one command takes its flags directly; with several, the first argument selects the command.
    """
    console = messages_console()
    set_up_logging(console)
    try:
        command, settings = parse(job, commands, arguments)
        return command.action(settings, console)
    except BatchclsError as error:
        # A traceback helps only where the program itself is at fault; the message is printed once in both cases.
        _logger.error("%s", error, exc_info=error.exit_code == ExitCode.UNEXPECTED)  # noqa: TRY400
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        # Python raises it without a message; `resumes_after_interrupt` adds the remedy.
        _logger.error("; ".join(filter(None, ("interrupted", str(interrupt)))))  # noqa: TRY400
        return ExitCode.INTERRUPTED
    except Exception:
        _logger.exception("unexpected error in batchcls or one of its dependencies")
        return ExitCode.UNEXPECTED


@contextmanager
def resumes_after_interrupt(is_resumable: Callable[[], bool]) -> Iterator[None]:
    """Add to the message of an interrupt of the block that the same command resumes.

    Args:
        is_resumable: called after an interrupt; returns whether the same command resumes.
    """
    try:
        yield
    except KeyboardInterrupt:
        if is_resumable():
            raise KeyboardInterrupt("run the same command again to resume") from None
        raise


def main(job: str, commands: Sequence[Command[Any]], arguments: Sequence[str] | None = None) -> None:
    """Run a job and end the process with its exit code immediately.

    Args:
        job: name of the job, as in `batchcls JOB`.
        commands: the commands of the job.
        arguments: the words after the job's name; None: those of the process.

    Arrow threads may still wait for a store that has failed, and a regular exit of the interpreter waits for them: it
    hung in four of six attempts (docs/measurements).
    """
    exit_code = run(job, commands, arguments)
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if standard output is closed
        os._exit(exit_code)


def parser_of(job: str, commands: Sequence[Command[Any]]) -> argparse.ArgumentParser:
    """The parser of a job: its flags, or one sub-command for each of its commands."""
    prog = f"batchcls {job}"
    if len(commands) == 1:
        (command,) = commands
        parser = parser_for(prog, command.settings.__doc__ or "", command.examples)
        add_settings(parser, command.settings, command.positional)
        return parser
    examples = "".join(command.examples.removeprefix(EXAMPLES) for command in commands)
    parser = parser_for(prog, "", EXAMPLES + examples)
    choices = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in commands:
        child = choices.add_parser(
            command.name,
            help=(command.settings.__doc__ or "").partition("\n")[0],
            description=command.settings.__doc__,
            epilog=command.examples,
            formatter_class=parser.formatter_class,
        )
        add_settings(child, command.settings, command.positional)
    return parser


def parse(
    job: str, commands: Sequence[Command[Any]], arguments: Sequence[str] | None
) -> tuple[Command[Any], BaseModel]:
    """Return the command that the arguments of a job select, and its settings.

    Raises:
        InputError: an argument is missing or invalid.
    """
    parser = parser_of(job, commands)
    namespace = parser.parse_args(arguments)
    if len(commands) == 1:
        return commands[0], read_settings(commands[0].settings, namespace)
    by_name = {command.name: command for command in commands}
    if namespace.command is None:
        raise InputError(f"a command is required: {', '.join(by_name)}; see {parser.prog} --help")
    command = by_name[namespace.command]
    del namespace.command
    return command, read_settings(command.settings, namespace)
