"""Names of the files and folders in an output folder, which are a contract with readers.

OUTPUT/current.json
OUTPUT/beginning/DIGEST/lease/*.json   who is about to begin a run; gone once it holds the run
OUTPUT/runs/RUN_ID/plan.json            first
                   predictions/*.parquet
                   quarantine/*.parquet
                   receipts/*.json      one for each part, after its files
                   lease/*.json         which driver works on the run
                   reused.json          once the predictions of an earlier run are copied
                   run.json             last, the commit record
                   readers/NAME.json    who wants the run kept for a while, {"until": TIME}
                   removal.json         first of a removal, and with lease/ the last that goes
"""

import secrets
from datetime import UTC, datetime

from batchcls.storage.filesystem import join

PLAN = "plan.json"
RUN = "run.json"
CURRENT = "current.json"
RUNS = "runs"
BEGINNING = "beginning"
PREDICTIONS = "predictions"
QUARANTINE = "quarantine"
READERS = "readers"
RECEIPTS = "receipts"
LEASE = "lease"
REUSED = "reused.json"
REMOVAL = "removal.json"


def new_run_id(now: datetime | None = None) -> str:
    """A name that sorts by time and does not meet another one: 20261122-033000-4f2a."""
    return f"{now or datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_folder(output: str, run_id: str) -> str:
    """URI of a run's folder."""
    return join(output, RUNS, run_id)
