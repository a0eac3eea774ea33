"""current.json: the one name that readers in the shop follow."""

import json
from datetime import UTC, datetime

from batchcls.runs.layout import CURRENT
from batchcls.storage import Storage, join


def publish(output: str, run_id: str, storage: Storage) -> None:
    """Make a committed run the current one; a reader sees the old or the new one, never half."""
    record = {
        "format": "batchcls-current-1",
        "run_id": run_id,
        "path": f"runs/{run_id}",
        "published": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    storage.write_whole(join(output, CURRENT), json.dumps(record, indent=2).encode())
