"""Finds the processes of a cluster by a variable in their environment, so that tests only kill their own."""

import os
from pathlib import Path


def processes_with(mark: str) -> list[int]:
    """PIDs of running processes with `NAME=value` in their environment, and of all their descendants.

    Ray's workers overwrite their environment with their title; the raylet that started them does not.
    """
    pids, parents = set(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended, or not readable
            continue
        if status[0] != "Z":
            parents[int(entry.name)] = int(status[1])
            if mark.encode() in environment.split(b"\0"):
                pids.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= more
    return sorted(pids - {os.getpid()})


def children_of(parent: int) -> list[int]:
    """PIDs of the running child processes of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # ended
                continue
            if status[0] != "Z" and int(status[1]) == parent:
                found.append(int(entry.name))
    return found


def title_of(pid: int) -> str:
    """Command line of a process, which Ray sets for workers; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
