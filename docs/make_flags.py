"""Writes docs/flags.md from the settings, so that the reference cannot drift: `make docs`."""

from pathlib import Path

from batchcls.flags import add_settings, parser_for
from batchcls.jobs import bundle, classify, compare, evaluate, finetune, manifest, runs


def main() -> None:
    """One section a command, each with its own --help."""
    lines = ["# Commands and flags", "", "Made by `make docs` from the settings themselves.", ""]
    for module in (classify, finetune, evaluate, compare, manifest, bundle, runs):
        for command in module.COMMANDS:
            job = module.__name__.rpartition(".")[2]
            name = job if len(module.COMMANDS) == 1 else f"{job} {command.name}"
            parser = parser_for(
                f"python -m batchcls.jobs.{name}", command.settings.__doc__ or "", command.examples
            )
            add_settings(parser, command.settings, command.positional)
            lines += [f"## {name}", "", "```", parser.format_help().rstrip(), "```", ""]
    Path(__file__).with_name("flags.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
