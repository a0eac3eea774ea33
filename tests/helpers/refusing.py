"""A file system that lacks calls: the kernel itself refuses them to this process, by a seccomp filter."""

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
"""Numbers of system calls on x86_64 and on arm64."""

_MACHINES = {"x86_64": 0, "aarch64": 1}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def can_refuse() -> bool:
    """Whether this machine is one whose calls are known here."""
    return sys.platform == "linux" and platform.machine() in _MACHINES


def refuse(calls: Mapping[str, int]) -> None:
    """From now on each of these calls fails in this process and its children with the error number given.

    Raises:
        OSError: the kernel allows no filter here.
    """
    place = _MACHINES[platform.machine()]
    program = [(_LOAD, 0, 0, 0)]  # the number of the call
    for name, code in calls.items():
        number = CALLS[name][place]
        if number is not None:
            program += [(_JUMP_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | code)]
    program.append((_RETURN, 0, 0, _ALLOW))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")
