"""The processes of one cluster, found by a mark in their environment, so that tests kill none but their own."""

import os
from pathlib import Path


def processes_with(mark: str) -> list[int]:
    """Living processes whose environment holds this `NAME=value`, and all that descend from them.

    Ray's workers overwrite their environment with their title; the raylet that started them does not.
    """
    found, parents = set(), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
            environment = (entry / "environ").read_bytes()
        except OSError:  # it ended, or is not ours to read
            continue
        if status[0] != "Z":
            parents[int(entry.name)] = int(status[1])
            if mark.encode() in environment.split(b"\0"):
                found.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def title_of(pid: int) -> str:
    """Its command line, as Ray sets it for workers; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
