"""The documented lines of cron, systemd and Airflow repeat the job only after exit codes that are worth it."""

import configparser
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from batchcls.errors import ExitCode
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/how-to/nightly-runs.md").read_text(encoding="utf-8")
RETRY = REPOSITORY / "jobs" / "retry.sh"
FAILURES = [code for code in ExitCode if code is not ExitCode.DONE]
KILLED = 137


def blocks(language: str) -> list[str]:
    """Code blocks of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def calls(folder: Path, script: str, retries: int = 2) -> tuple[int, int]:
    """Run a shell script with jobs/retry.sh; return the exit code and how often the script ran."""
    counted = folder / "calls"
    counted.write_text("")
    done = subprocess.run(
        ["sh", str(RETRY), "sh", "-c", f'echo >> "$0"; {script}', str(counted)],
        env=os.environ | {"RETRIES": str(retries), "RETRY_SECONDS": "0"},
        capture_output=True,
        check=False,
    )
    return done.returncode, len(counted.read_text().splitlines())


@pytest.mark.parametrize("code", [*ExitCode, KILLED, 126, 127])
def test_retry_script_repeats_transient_failures_only(tmp_path: Path, code: int):
    is_transient = code == KILLED or (code in list(ExitCode) and ExitCode(code).is_transient)
    assert calls(tmp_path, f"exit {int(code)}") == (code, 3 if is_transient else 1)
    assert calls(tmp_path, f"exit {int(code)}", retries=0) == (code, 1)


def test_retry_script_repeats_a_killed_command_and_ends_with_its_success(tmp_path: Path):
    assert calls(tmp_path, "kill -9 $$") == (KILLED, 3)
    assert calls(tmp_path, 'test "$(wc -l < "$0")" -eq 2') == (0, 2)


def test_cron_lines_use_the_retry_script():
    lines = [line for block in blocks("cron") for line in block.splitlines()]
    assert len(lines) == 2
    assert "sh jobs/retry.sh python -m batchcls.jobs.classify --config" in lines[0]
    assert "sh jobs/retry.sh jobs/submit.sh classify --config" in lines[1]  # `ray job submit` loses the code


def test_kubernetes_does_not_retry_permanent_failures():
    folder = REPOSITORY / "cluster" / "kuberay"
    for name in ("rayjob.yaml", "raycronjob.yaml"):
        limits = re.findall(r"^ *backoffLimit: (\d+)", (folder / name).read_text(), re.MULTILINE)
        assert set(limits) == {"0"}, name
    cronjob = yaml.safe_load((folder / "cronjob.yaml").read_text())
    (rule,) = [
        rule
        for rule in cronjob["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
        if rule["action"] == "FailJob"
    ]
    permanent = [int(code) for code in FAILURES if not code.is_transient]
    assert (rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("In", permanent)


def test_systemd_unit_prevents_retries_of_permanent_failures():
    (block,) = blocks("ini")
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block)
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    prevented = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert prevented == {int(code) for code in FAILURES if not code.is_transient}


class _FailWithoutRetryError(Exception):
    """Stands for Airflow's exception, which is not installed for tests."""


@pytest.mark.parametrize("code", [*ExitCode, KILLED])
def test_airflow_task_fails_without_retry_after_permanent_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    (block,) = [block for block in blocks("python") if "airflow" in block]
    exceptions, sdk = types.ModuleType("airflow.exceptions"), types.ModuleType("airflow.sdk")
    vars(exceptions)["AirflowFailException"] = _FailWithoutRetryError
    vars(sdk)["task"] = lambda **settings: lambda function: function
    for name, module in (("airflow", types.ModuleType("airflow")), (exceptions.__name__, exceptions)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, sdk.__name__, sdk)
    names: dict = {}
    exec(compile(block, "nightly-runs.md", "exec"), names)
    names |= {"FOLDER": str(tmp_path), "COMMAND": ["sh", "-c", f"exit {int(code)}"]}
    if code == ExitCode.DONE:
        names["classify_catalog"]()
        return
    is_transient = code == KILLED or ExitCode(code).is_transient
    with pytest.raises(
        RuntimeError if is_transient else _FailWithoutRetryError, match=f"exit code {int(code)}"
    ):
        names["classify_catalog"]()


def test_page_lists_every_exit_code_with_its_retry():
    rows = re.findall(r"^\| (\d+) \|.*\| (yes|no) \|$", PAGE, re.MULTILINE)
    assert rows == [(str(int(code)), "yes" if code.is_transient else "no") for code in sorted(ExitCode)]
