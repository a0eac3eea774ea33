"""The documentation builds without warnings, is current, and contains only commands that exist."""

import ast
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchcls
from batchcls.cli.arguments import add_settings, parser_for, read_settings
from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.jobs import bundle, classify, compare, evaluate, finetune, manifest, runs
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    *sorted(DOCS.rglob("*.md")),
    *sorted((REPOSITORY / "cluster").glob("*.md")),
]
GENERATED = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]
JOBS = {
    module.__name__.rpartition(".")[2]: module
    for module in (bundle, classify, compare, evaluate, finetune, manifest, runs)
}
COMMAND = re.compile(
    r"(?:python -m batchcls\.jobs\.|(?:(?<![\w./-])|\.venv/bin/)batchcls )(\w+)(?![\w.])(.*)"
)
MAKE = re.compile(r"^(?:\$ )?make ([a-z]+)")
TOP_FOLDERS = ("batchcls", "benchmarks", "cluster", "docs", "examples", "jobs", "tests")


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str):
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == GENERATED[name](), f"docs/{name} is stale: run `make docs`"


def test_site_builds_without_warnings(tmp_path: Path):
    """MkDocs checks every internal link and anchor, and that every page is in the navigation."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").stat().st_size > 1000


def test_links_of_the_readme_resolve():
    """MkDocs does not see README.md, whose links lead into docs/."""
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (REPOSITORY / link).exists()] == []


def test_python_examples_use_names_that_exist():
    """Code blocks in Python parse, and every `batchcls.NAME` and every setting of `classify` in them exists."""
    settings = {*ClassifyConfig.model_fields, *inspect.signature(batchcls.classify).parameters}
    calls = 0
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "batchcls":
                    assert node.attr in batchcls.__all__, f"{page}: batchcls.{node.attr}"
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "batchcls.classify":
                    calls += 1
                    assert {keyword.arg for keyword in node.keywords} <= settings, page
    assert calls >= 4


def test_command_lines_parse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    found = 0
    errors = []
    for page in PAGES:
        for line in _code_lines(page):
            for job, rest in COMMAND.findall(line):
                found += 1
                try:
                    _parse(job, rest)
                except (InputError, KeyError, ValueError, SystemExit) as error:
                    errors.append(f"{page.relative_to(REPOSITORY)}: {line.strip()}: {error}")
    assert found > 40
    assert errors == []


def test_make_targets_and_paths_in_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`make ([a-z]+)", text) + [
            target for line in _code_lines(page) for target in MAKE.findall(line)
        ]
        missing += [f"{page.name}: make {target}" for target in named if target not in targets]
        for line in _code_lines(page):
            missing += [
                f"{page.name}: {name}" for name in _repository_paths(line) if not (REPOSITORY / name).exists()
            ]
    assert missing == []


def test_files_named_in_where_to_change_exist():
    text = (DOCS / "contributing" / "where-to-change.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:batchcls|docs|tests)/[\w./-]+)`", text)
    assert len(names) > 15
    assert [name for name in names if not (REPOSITORY / name).exists()] == []
    for row in re.findall(r"^\| (?:A|Another) .*$", text, re.MULTILINE):
        assert len(re.findall(r"`(?:batchcls|docs)/[\w./-]+`", row)) <= 3


def _code_lines(page: Path) -> Iterator[str]:
    """Lines of the fenced code blocks of a page, continuation lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for block in blocks:
        yield from re.sub(r"\\\n\s*", "", block).splitlines()


def _parse(job: str, rest: str) -> None:
    """Parse one command as the job does; an elided command (`...`) may lack required settings."""
    words = shlex.split(re.split(r"`|\s(?:>>|\||&&|;)\s", rest)[0], comments=True)
    words = [word.strip("[]") for word in words]
    commands = {command.name: command for command in JOBS[job].COMMANDS}
    if len(commands) > 1:
        if not words or words[0] in ("--help", "..."):
            return
        command = commands[words.pop(0)]
    else:
        (command,) = commands.values()
    if "--help" in words:
        return
    parser = parser_for(job, "", "")
    add_settings(parser, command.settings, command.positional)
    namespace = parser.parse_args([word for word in words if word != "..."])
    if "..." not in words:
        read_settings(command.settings, namespace)


def _repository_paths(line: str) -> list[str]:
    names = re.findall(rf"(?<![\w./:-])(?:{'|'.join(TOP_FOLDERS)})/[\w./-]+", line.partition("  #")[0])
    modules = re.findall(r"python -m (benchmarks\.\w+)", line)
    return names + [f"{module.replace('.', '/')}.py" for module in modules]
