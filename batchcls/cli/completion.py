"""Completion scripts for shells, generated from the settings classes of all commands."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import shtab
from pydantic import BaseModel

from batchcls.cli.app import Command, parser_of
from batchcls.cli.arguments import alternatives

_FILES = frozenset(
    {"config", "manifest", "output", "model", "bundle", "weights", "labels", "folder", "work_dir"}
)
"""Arguments whose values are often paths on the local file system."""


def completion_script(shell: str, jobs: Mapping[str, Sequence[Command[Any]]]) -> str:
    """A script that completes commands, flags, the values of enumerations, and file names.

    Args:
        shell: bash, zsh or fish.
        jobs: the commands of each job, by the job's name.
    """
    parser = argparse.ArgumentParser(prog="batchcls", allow_abbrev=False)
    parser.add_argument("--version", action="version", version="")
    subparsers = parser.add_subparsers()
    for job, commands in jobs.items():
        described = parser_of(job, commands)
        child = subparsers.add_parser(job, help=described.description, parents=[described], add_help=False)
        _mark_values(child, commands)
    completion = subparsers.add_parser("completion", help="Print a completion script.")
    completion.add_argument("shell", choices=["bash", "zsh", "fish"])
    script: str = shtab.complete(parser, shell)
    return script


def _mark_values(parser: argparse.ArgumentParser, commands: Sequence[Command[Any]]) -> None:
    """Tell shtab which values the flags of a job take."""
    children = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not children:
        _mark_flags(parser, commands[0].settings)
    for child in children:
        for command in commands:
            _mark_flags(child.choices[command.name], command.settings)


def _mark_flags(parser: argparse.ArgumentParser, settings: type[BaseModel]) -> None:
    for action in parser._actions:
        field = settings.model_fields.get(action.dest)
        if action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif field is not None and action.nargs != 0:
            choices = [
                str(value)
                for kind in alternatives(field.annotation)
                if get_origin(kind) is Literal
                for value in get_args(kind)
            ]
            action.choices = choices or None
