"""A job's process ends with its exit code, whatever its threads still wait for."""

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
    print("said", end="")
    return ExitCode.BUDGET_EXCEEDED

main("nothing", [Command("nothing", Nothing, act, "")])
"""


def test_a_thread_that_never_ends_does_not_hold_the_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (4, "said"), done.stderr
