"""Rules of the repository (docs/explanation/architecture.md), checked for every file of the package."""

import ast
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from batchcls.jobs import bundle, classify, compare, evaluate, finetune, manifest, runs
from batchcls.schema import REASONS, Reason
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "batchcls"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Layers from the top down; a package imports from itself and from layers below it.
LAYERS = (
    ("__main__",),
    ("cli.main",),
    ("api", "jobs"),
    ("pipeline", "training"),
    ("cli", "report"),
    ("cluster",),
    ("ray_runtime",),
    ("resources", "runs", "comparison", "evaluation"),
    ("inference",),
    ("images", "models"),
    ("manifest",),
    ("config",),
    ("storage",),
    ("preprocessing", "hardware", "schema", "errors"),
)
HEIGHT = {package: height for height, packages in enumerate(reversed(LAYERS)) for package in packages}
MAY_IMPORT_RAY = ("pipeline", "training", "cluster", "ray_runtime", "jobs")


def package_of(path: Path) -> str:
    """The package of a module; the console script is above the jobs, which it imports only to run them."""
    if path == PACKAGE / "cli" / "main.py":
        return "cli.main"
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def calls(path: Path) -> list[ast.expr]:
    """The called expressions in a file."""
    return [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


def test_every_module_is_in_a_layer():
    assert len(MODULES) > 40
    assert {package_of(path) for path in MODULES} - {"__init__"} == set(HEIGHT)


def test_imports_run_downwards_and_ray_is_imported_in_four_packages():
    wrong = []
    for path in MODULES:
        package = package_of(path)
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "ray" and package not in MAY_IMPORT_RAY:
                wrong.append(f"{path} imports {name}")
            if top == "batchcls" and rest and package != "__init__" and rest[0] != package:
                upwards = HEIGHT[rest[0]] > HEIGHT[package]
                if upwards or {package, rest[0]} == {"images", "models"}:
                    wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_only_jobs_and_the_api_know_the_settings_of_the_classify_job():
    """Everything below takes the group of settings that it needs, so a flag is added in one place."""
    found = [
        str(path)
        for path in MODULES
        if package_of(path) not in ("api", "jobs", "config")
        and "batchcls.config.classify_config" in imports(path)
    ]
    assert found == []


def test_every_file_has_a_docstring_and_a_bounded_length():
    texts = {path: path.read_text() for path in MODULES}
    assert [path for path in MODULES if not ast.get_docstring(parsed(path))] == []
    assert [path for path, text in texts.items() if len(text.splitlines()) > 450] == []
    assert [path for path, text in texts.items() if re.search(r"\b(TODO|FIXME|XXX)\b", text)] == []


def test_broad_except_clauses_are_only_in_allowed_files():
    allowed = {"images/fetch.py", "images/decode.py", "cli/console.py", "cli/app.py", "report/run_report.py"}
    found = []
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else "bare"
                passed_on = isinstance(node.body[-1], ast.Raise)
                if names in ("bare", "Exception", "BaseException") and not passed_on:
                    found.append((str(path.relative_to(PACKAGE)), node.lineno))
    assert [(name, line) for name, line in found if name not in allowed] == []


def test_no_scan_holds_the_interpreter():
    """Arrow's `to_reader` can hang for ever where a read through Python fails; see `runs.records.read_columns`."""
    found = [
        f"{path}:{func.lineno}"
        for path in MODULES
        for func in calls(path)
        if isinstance(func, ast.Attribute) and func.attr == "to_reader"
    ]
    assert found == []


def test_importing_does_nothing_and_tests_are_not_needed():
    """In a fresh process: no output, no thread, no folder, no development package."""
    code = (
        "import sys, threading, importlib\n"
        f"for name in {[_module(path) for path in MODULES]!r}: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert not {'pytest', 'hypothesis', 'polars'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def _module(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def test_every_reason_has_a_stage_and_a_meaning():
    assert set(REASONS) == set(Reason)


def test_no_file_names_a_registry_or_a_machine():
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    # Documents may name the temporary folder of the system, which may also contain the checkout.
    is_temporary = REPOSITORY.parent == Path(tempfile.gettempdir())
    folder = REPOSITORY if is_temporary else REPOSITORY.parent
    bad = re.compile(r"index-url|find-links|https?://[^\s\"']*(/simple\b|\.whl)|" + re.escape(f"{folder}/"))
    for name in tracked.stdout.split():
        path = REPOSITORY / name
        if path != Path(__file__) and path.is_file() and path.stat().st_size < 1_000_000:
            assert not bad.search(path.read_text(errors="replace")), name


def test_every_command_has_help_with_examples():
    for module in (classify, finetune, evaluate, compare, manifest, bundle, runs):
        for command in module.COMMANDS:
            assert "examples:" in command.examples
            assert command.settings.__doc__
            assert f"batchcls {module.__name__.rpartition('.')[2]} " in command.examples


def test_only_the_console_module_writes_to_the_terminal():
    handlers = {"Console", "RichHandler", "StreamHandler", "basicConfig", "print_exc"}
    found = []
    for path in MODULES:
        if path == PACKAGE / "cli" / "console.py":
            continue
        for func in calls(path):
            name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
            if name in handlers or (isinstance(func, ast.Name) and name == "print"):
                found.append(f"{path}:{func.lineno}")
    assert found == []
