"""Runs Python subprocesses and logs progress."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def note(text: str) -> None:
    """Print a progress line to stderr."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def python(arguments: list[str], folder: Path) -> str:
    """Run Python in the repository and return its stdout.

    Raises:
        SystemExit: it failed; with the end of its stderr.
    """
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "BATCHCLS_CACHE_DIR": str(folder / "cache"),  # separate from the cache of other runs
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=environment,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout
