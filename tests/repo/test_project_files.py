"""The files around the code: workflows, hooks and links name things that exist."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
# Pages outside the documentation site, whose links MkDocs does not check.
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("[a-z]*/README.md")])
DECISIONS = sorted((REPOSITORY / "docs" / "decisions").glob("[0-9]*.md"))
SECTIONS = ("Status", "Context", "Decision", "Consequences")


def _yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)


def _make_targets() -> set[str]:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def _make_calls(text: str) -> set[str]:
    """Targets of every `make A B` at the start of a shell line."""
    found: set[str] = set()
    for arguments in re.findall(r"^make((?: [a-z-]+)+)$", text, re.MULTILINE):
        found |= set(arguments.split())
    return found


def _workflow_commands(path: Path) -> str:
    steps = [step for job in _yaml(path)["jobs"].values() for step in job["steps"]]
    return "\n".join(step["run"].strip() for step in steps if "run" in step)


def test_workflows_call_existing_make_targets():
    called: set[str] = set()
    for path in WORKFLOWS:
        called |= _make_calls(_workflow_commands(path))
    assert called >= {"lint", "type", "test", "docs", "dist"}
    assert called <= _make_targets()


def test_ci_workflow_runs_every_check_of_the_local_ci_script():
    script = REPOSITORY / ".ci" / "run"
    if not script.is_file():
        pytest.skip("the repository has no .ci/run")
    local = _make_calls(script.read_text(encoding="utf-8"))
    assert local
    assert local <= _make_calls(_workflow_commands(REPOSITORY / ".github" / "workflows" / "ci.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_restrict_permissions_and_limit_time(path: Path):
    workflow = _yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert set(job.get("permissions", {})) <= {"contents"}
        assert all("uses" in step or "run" in step for step in job["steps"])
        if any(step.get("run", "").startswith("make ") for step in job["steps"]):
            assert 0 < job["timeout-minutes"] <= 60


def test_issue_forms_have_unique_ids_and_required_answers():
    forms = [
        path for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"
    ]
    assert len(forms) >= 2
    for path in forms:
        form = _yaml(path)
        assert {"name", "description", "body"} <= set(form)
        ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
        assert len(ids) == len(set(ids)), path
        assert any(field.get("validations", {}).get("required") for field in form["body"]), path


def test_local_pre_commit_hooks_run_tools_of_the_development_environment():
    repositories = _yaml(REPOSITORY / ".pre-commit-config.yaml")["repos"]
    (local,) = [repository for repository in repositories if repository["repo"] == "local"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    development = {re.match(r"[\w-]+", name).group() for name in project["optional-dependencies"]["dev"]}  # type: ignore[union-attr]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in local["hooks"]}
    assert tools == {"ruff", "mypy"}
    assert tools <= development


def test_license_file_is_the_declared_license():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    license_text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert re.search(r"Apache License\s+Version 2\.0, January 2004", license_text)
    assert "END OF TERMS AND CONDITIONS" in license_text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_relative_links_lead_to_files_and_headings(path: Path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, heading = (link[0] or link[1]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{target} does not exist"
        if heading:
            assert heading in _anchors(file), f"{target}#{heading} does not exist"


def _anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_decisions_have_the_standard_sections(path: Path):
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert tuple(heading for heading in headings if heading in SECTIONS) == SECTIONS
    assert text.startswith(f"# {int(path.stem[:3])}. ")


def test_contributing_guide_names_existing_make_targets():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    calls = {name for group in re.findall(r"make((?: [a-z]+)+)`", text) for name in group.split()}
    assert calls
    assert calls <= _make_targets()


def test_source_distribution_files_are_tracked():
    """A file that .gitignore hides would be missing from a clone, and the wheel with it."""
    ignored = subprocess.run(
        ["git", "ls-files", "-oi", "--exclude-standard", "batchcls"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if ignored.returncode != 0:
        pytest.skip("not a git checkout")
    assert [name for name in ignored.stdout.split() if "__pycache__" not in name] == []
