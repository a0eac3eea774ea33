"""The process of a job ends with its exit code even if threads are still waiting."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from batchcls import api
from batchcls.cli.app import run
from batchcls.errors import ExitCode
from batchcls.jobs import classify

PROGRAM = """
import threading
from pydantic import BaseModel
from batchcls.errors import ExitCode
from batchcls.cli.app import Command, main

class Nothing(BaseModel):
    '''Do nothing.'''

def act(settings, console):
    threading.Thread(target=threading.Event().wait).start()
    print("output", end="")
    return ExitCode.BUDGET_EXCEEDED

main("nothing", [Command("nothing", Nothing, act, "")])
"""


def test_process_exits_despite_a_blocked_thread():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (4, "output"), done.stderr


CLASSIFY = ["--manifest", "m.parquet", "--model", "resnet50", "--output", "out"]


def test_interrupt_of_classify_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_classify", interrupted)
    assert run("classify", classify.COMMANDS, CLASSIFY) == ExitCode.INTERRUPTED
    printed = capfd.readouterr().err
    assert printed.rstrip().endswith("interrupted; run the same command again to resume")
    assert len(printed.splitlines()) == 1


def test_interrupt_after_the_commit_does_not_promise_to_resume(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    class CommittedEarlier:
        summary = None

    def interrupted(config: object, console: object, on_commit: Callable[[object], None]) -> None:
        on_commit(CommittedEarlier())
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run_classify", interrupted)
    assert run("classify", classify.COMMANDS, CLASSIFY) == ExitCode.INTERRUPTED
    assert capfd.readouterr().err.rstrip().endswith("interrupted")
