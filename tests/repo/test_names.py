"""Names and structure: one name for one thing and no import cycles."""

import ast
from collections import Counter
from pathlib import Path

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "batchcls"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOP_LEVEL = {"errors", "hardware", "preprocessing", "ray_runtime", "resources", "schema"}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def test_at_most_seven_modules_lie_beside_the_packages():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == TOP_LEVEL


def test_no_two_modules_share_a_name():
    names = Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_no_two_classes_share_a_name():
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert {name: count for name, count in names.items() if count > 1} == {}


def imported_modules(path: Path, names: set[str]) -> set[str]:
    """Modules of the package that are imported whenever `path` is; imports inside functions are not."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in names else node.module)
    return (found & names) - {module_name(path)}


def test_no_modules_import_each_other():
    names = {module_name(path) for path in MODULES}
    waiting = {module_name(path): imported_modules(path, names) for path in MODULES}
    while free := [name for name, needs in waiting.items() if not needs]:
        for name in free:
            del waiting[name]
        waiting = {name: needs - set(free) for name, needs in waiting.items()}
    assert waiting == {}, "these modules are in a cycle, or import one that is"
