"""The process of a job ends with its exit code even if threads are still waiting."""

import subprocess
import sys

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
