"""The environment variables that a job sets before it opens its inputs in a thread and connects to Ray."""

import subprocess
import sys

# Reads the address of the array of variables that C code reads, before and after Ray's variables are added.
_ADD_VARIABLES = """
import ctypes, os
from batchcls.ray_runtime import prepare_environment

def array():
    return ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ").value

prepare_environment()
before, blocks = array(), []
assert not {"RAY_AUTH_MODE", "PYTHONBREAKPOINT"} & os.environ.keys()
for name in ("RAY_AUTH_MODE", "PYTHONBREAKPOINT"):
    blocks += [bytearray(size) for size in range(16, 4096, 16)]  # so that the array cannot grow where it is
    os.environ[name] = "1"
    assert array() == before, name
prepare_environment()
assert array() == before, "second call"
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
