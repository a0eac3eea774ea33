"""The `batchcls` command: runs the job that the first argument names.

Only the module of the selected job is imported, because torch and Ray take seconds to import: `batchcls --help` and
`batchcls --version` respond immediately. `python -m batchcls NAME` and `python -m batchcls.jobs.NAME` are the same
command as `batchcls NAME`.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from batchcls import __version__

if TYPE_CHECKING:
    from batchcls.cli.app import Command

JOBS = {
    "classify": "Classify a catalog: manifest in, predictions and embeddings out.",
    "runs": "List, inspect, compare, publish, roll back, prune and verify runs.",
    "bundle": "Create, extend, inspect, test and export model bundles; list the model zoo.",
    "compare": "Benchmark backbones on your hardware and your images.",
    "finetune": "Train a classifier on labeled images.",
    "evaluate": "Measure the accuracy and calibration of a bundle or of a run.",
    "manifest": "Create a manifest from a folder of images, or validate one.",
}
"""Every job with its summary, in the order of `batchcls --help`."""

_VERSION = f"batchcls {__version__}\n"
_HELP_FLAGS = ("-h", "--help", "--help-all")
_VERSION_FLAGS = ("-V", "--version")

SHELLS = ("bash", "zsh", "fish")

_SHELL_NAMES = f"{', '.join(SHELLS[:-1])} or {SHELLS[-1]}"

_COMPLETION_HELP = f"""usage: batchcls completion {"|".join(SHELLS)}

Print a completion script for {_SHELL_NAMES}.

examples:
  source <(batchcls completion bash)
"""

_HELP = f"""usage: batchcls COMMAND [OPTIONS]

Classify whole image catalogs nightly on Ray.

commands:
{"".join(f"  {name:12}{summary}{chr(10)}" for name, summary in JOBS.items())}\
  completion  Print a completion script for {_SHELL_NAMES}.

options:
  -h, --help  Show this message and exit.
  --version   Show the version and exit.

Run `batchcls COMMAND --help` for the options of a command.
"""


def main() -> None:
    """Run `batchcls` with the arguments of the process; the process ends with the exit code of the job."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in (*_HELP_FLAGS, "help"):
        sys.stdout.write(_HELP)
    elif name in _VERSION_FLAGS:
        sys.stdout.write(_VERSION)
    elif name == "completion":
        sys.exit(_completion(arguments))
    elif name in JOBS:
        from batchcls.cli import app

        app.main(name, commands_of(name), arguments)
    else:
        sys.exit(_unknown(name))


def commands_of(job: str) -> Sequence["Command[Any]"]:
    """The commands of a job; imports its module and with it whatever the job needs.

    Args:
        job: a key of `JOBS`.
    """
    commands: Sequence[Command[Any]]
    match job:
        case "classify":
            from batchcls.jobs import classify

            commands = classify.COMMANDS
        case "runs":
            from batchcls.jobs import runs

            commands = runs.COMMANDS
        case "bundle":
            from batchcls.jobs import bundle

            commands = bundle.COMMANDS
        case "compare":
            from batchcls.jobs import compare

            commands = compare.COMMANDS
        case "finetune":
            from batchcls.jobs import finetune

            commands = finetune.COMMANDS
        case "evaluate":
            from batchcls.jobs import evaluate

            commands = evaluate.COMMANDS
        case "manifest":
            from batchcls.jobs import manifest

            commands = manifest.COMMANDS
        case _:
            raise ValueError(f"no such job: {job}")
    return commands


def _completion(arguments: Sequence[str]) -> int:
    """Print the completion script of a shell and return the exit code."""
    if arguments and arguments[0] in (*_HELP_FLAGS, *_VERSION_FLAGS):
        sys.stdout.write(_COMPLETION_HELP if arguments[0] in _HELP_FLAGS else _VERSION)
        return 0

    from batchcls.cli.completion import completion_script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        return _fail(f"a shell is required: batchcls completion {'|'.join(SHELLS)}")
    sys.stdout.write(completion_script(arguments[0], {job: commands_of(job) for job in JOBS}))
    return 0


def _unknown(name: str) -> int:
    from batchcls.cli.arguments import suggestion

    return _fail(f"unknown command {name}{suggestion(name, [*JOBS, 'completion'])}; see batchcls --help")


def _fail(message: str) -> int:
    """Log an error in the way every job does and return the exit code for bad input."""
    import logging

    from batchcls.cli.console import messages_console, set_up_logging
    from batchcls.errors import ExitCode

    set_up_logging(messages_console())
    logging.getLogger("batchcls").error("%s", message)
    return ExitCode.BAD_INPUT


if __name__ == "__main__":
    main()
