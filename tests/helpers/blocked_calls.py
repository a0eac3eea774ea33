"""Simulates a file system without some system calls, which a seccomp filter rejects."""

import ctypes
import platform
import struct
import sys
from collections.abc import Mapping

CALLS = {
    "fsync": (74, 82),
    "flock": (73, 32),
    "link": (86, None),
    "linkat": (265, 37),
    "renameat2": (316, 276),
}
"""Numbers of the system calls on x86_64 and arm64; None if the call does not exist."""

_MACHINES = {"x86_64": 0, "aarch64": 1}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000


def can_block_calls() -> bool:
    """Whether the system call numbers of this machine are known."""
    return sys.platform == "linux" and platform.machine() in _MACHINES


def block_calls(calls: Mapping[str, int]) -> None:
    """Make system calls fail in this process and its children.

    Args:
        calls: error number by name of the call.

    Raises:
        OSError: the kernel does not allow the filter.
    """
    column = _MACHINES[platform.machine()]
    program = [(_LOAD, 0, 0, 0)]  # load the number of the call
    for name, code in calls.items():
        number = CALLS[name][column]
        if number is not None:
            program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _FAIL | code)]
    program.append((_RETURN, 0, 0, _ALLOW))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "cannot set a seccomp filter")
