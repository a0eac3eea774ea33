"""Linters of the files that are not Python: shellcheck and hadolint, which `make setup` installs as wheels."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

BIN = Path(sys.executable).parent


def _shell_scripts() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.sh", ".ci/run"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def _lint(*command: str | Path, stdin: str | None = None) -> tuple[int, str]:
    done = subprocess.run(command, cwd=REPOSITORY, input=stdin, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_shellcheck_accepts_every_script():
    scripts = _shell_scripts()
    assert {"cluster/local.sh", "jobs/submit.sh"} <= set(scripts)
    assert _lint(BIN / "shellcheck", *scripts) == (0, "")


def test_hadolint_accepts_the_dockerfile():
    assert _lint(BIN / "hadolint", "--no-color", "cluster/Dockerfile") == (0, "")
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    code, output = _lint(BIN / "hadolint", "--no-color", "-", stdin=text.replace("USER 1000", "USER root"))
    assert code == 1
    assert "DL3002" in output


def test_both_targets_of_the_dockerfile_run_without_privileges():
    text = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    stages = {part.split()[2]: part for part in ("\n" + text).split("\nFROM ")[1:] if len(part.split()) > 2}
    assert {"wheel", "base", "cpu", "cuda"} <= set(stages)
    for target in ("cpu", "cuda"):
        # The last user of a stage is that of its containers; Kubernetes requires a number.
        users = [line.split()[1] for line in stages[target].splitlines() if line.startswith("USER ")]
        assert users == ["1000"]
