"""The environment variables that a job sets before it opens its inputs in a thread and connects to Ray."""

import subprocess
import sys

# Reads the address of the array of variables that C code reads, before and after Ray's variables are added; with
# 16 numbers of variables, because the space that the array gets depends on it.
_ADD_VARIABLES = """
import ctypes, os
from batchcls.ray_runtime import prepare_environment

# Free blocks of every second size, so that some arrays get a block that is larger than they need.
blocks = [bytearray(size) for size in range(520, 4096, 32) for _ in range(40)]
del blocks[::2]

def array():
    return ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ").value

def add_variables(others):
    for number in range(others):
        os.environ[f"OTHER_{number}"] = "1"
    prepare_environment()
    before = array()
    assert "RAY_AUTH_MODE" not in os.environ
    for name in ("RAY_AUTH_MODE", "PYTHONBREAKPOINT"):
        blocks.extend(bytearray(size) for size in range(16, 4096, 16))  # so that the array cannot grow where it is
        os.environ[name] = "1"
        assert array() == before, (others, name)
    prepare_environment()
    assert array() == before, (others, "second call")

for others in range(80, 96):
    if not (child := os.fork()):
        add_variables(others)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not status, others
"""


def test_variables_that_ray_adds_do_not_move_the_array_that_other_threads_read(
    clean_environment: dict[str, str],
):
    environment = {k: v for k, v in clean_environment.items() if k != "PYTHONBREAKPOINT"}
    done = subprocess.run(
        [sys.executable, "-c", _ADD_VARIABLES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
