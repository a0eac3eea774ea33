"""Names and structure: one name for one thing, no import cycles, and the field's own words."""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "batchcls"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOP_LEVEL = {"__main__", "api", "errors", "hardware", "preprocessing", "ray_runtime", "resources", "schema"}

# Words of earlier versions and British spellings, each with what is written instead.
FORBIDDEN = {
    r"pictures?": "image",
    r"mourn\w*|_hand_out": "handle_actor_death, assign",
    r"accuse\w*|innocent|guilty": "isolate, isolated rows",
    r"take_over|take over|taken over": "copy, reuse",
    r"anew": "again",
    r"(goes|go|gone|going) on with": "resume",
    r"leavings": "leftover files",
    r"scarcest": "bottleneck resource",
    r"(settle|keep)_receipts?|living_holder": "select_receipts, write_receipt, live_holder",
    r"living[_ ]nodes?": "alive nodes, worker_nodes",
    r"close[_ ]calls?": "sampling_warning, within the sampling error",
    r"cpu_lanes|cuda_ring": "thread_pool, cuda_pipeline",
    r"labell(ed|ing)|colour\w*|behaviour\w*|neighbour\w*|favour\w*|honour\w*": "US spelling",
    r"(normal|optim|quant|summar|recogn|initial|organ|parallel|serial|minim|maxim|synchron)is(ed?|es|ing|ation)": (
        "US spelling"
    ),
    r"write_whole|look_into|find_bad_ids": "write_atomic, list_path, find_invalid_ids",
    r"ChangedMeanwhileError": "VersionConflictError",
    r"processor time": "CPU time",
    r"no room left": "no space left",
    r"bytes a pixel": "bytes per pixel",
    r"leads? nowhere": "broken link",
    r"wished": "requested, target",
    r"so many": "the number of",
    r"begun": "started, unfinished",
    r"told": "reported, message",
    r"(?<!server )(?<!store )(?<!host )answered": "predicted, responded",
    r"for people": "human-readable",
    r"what became of": "the outcome of, the status of",
    r"mend(s|ed|ing)?": "fix",
    r"poison image": "crash-inducing image",
    r"scarcest resource": "bottleneck resource",
    r"ms an image": "ms/image, ms per image",
    r"verdicts?|judg(e|es|ed|ing)": "decision, evaluate, publish_status",
    r"nobody|somebody|whoever": "no reader, another process, a user who",
    r"(says|said|heard|speaks) of": "reports, known",
    r"one by one|one after (the other|another)": "individually, sequentially",
    r"in place of": "instead of",
    r"of (its|their|our|your|his) own": "its own, separate, dedicated",
    r"no (valid )?UTF-8": "not valid UTF-8",
    r"go(es|ing) on": "continue, resume",
    r"beside": "next to, in addition to, in parallel with",
    r"(is|are|was|were) not there|not there yet": "does not exist",
    r"put together": "assemble, compose",
    r"(ms|seconds|bytes|images|photographs) an? (image|second|minute|fragment|file|row|pixel|core|node|step)": "per",
    r"stands? in|lies (in|below|under)": "is in, is under",
    r"dearest|dearer": "most expensive, slower",
    r"machine (idle|quiet|busy)": "idle machine, busy machine",
    r"towards": "toward",
    r"catalogues?|judgement|artefacts?|grey|centre": "US spelling",
}
TEXT = ("", ".py", ".md", ".toml", ".html", ".yml", ".yaml", ".sh", ".svg")
# The changelog names old flags, and this file the words themselves.
EXCEPTIONS = {"CHANGELOG.md", "tests/repo/test_names.py"}


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [REPOSITORY / name for name in done.stdout.split() if name not in EXCEPTIONS]


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def test_top_level_modules_are_the_listed_ones():
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


def test_forbidden_words_do_not_occur():
    # One pass over lower-case text takes a fifteenth of the time of a pass for each entry that ignores the case.
    assert not re.search(r"\\[A-Z]", "|".join(FORBIDDEN)), "lower case would change this class of characters"
    any_word = re.compile(rf"(?<![a-z])(?:{'|'.join(FORBIDDEN).lower()})(?![a-z])")
    found = []
    for path in tracked():
        if path.suffix not in TEXT or not path.is_file():
            continue
        text = f"{path.name}\n{path.read_text(errors='replace')}"
        if not any_word.search(text.lower()):
            continue
        for words, instead in FORBIDDEN.items():
            for match in re.finditer(rf"(?<![A-Za-z])({words})(?![A-Za-z])", text, re.IGNORECASE):
                line = text.count("\n", 0, match.start())
                found.append(f"{path.relative_to(REPOSITORY)}:{line}: {match[0]} ({instead})")
    assert found == []


COMMANDS = "runs|bundle|manifest|classify|compare|evaluate|finetune"


def test_messages_name_commands_as_the_user_types_them():
    """`batchcls runs list`, neither `runs list` nor `python -m batchcls.jobs.runs list`."""
    wrong = re.compile(rf"`(?:{COMMANDS}) [a-z]|python -m batchcls\.jobs\.")
    found = [
        f"{path}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if wrong.search(line) and path != PACKAGE / "cli" / "main.py"
    ]
    assert found == []


def test_documents_name_commands_as_the_user_types_them():
    wrong = re.compile(rf"`(?:{COMMANDS}) [a-z]")
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for path in tracked()
        if path.suffix == ".md" and path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if wrong.search(line)
    ]
    assert found == []
