"""Names of the files and folders in an output folder, which are a contract with readers.

OUTPUT/current.json
OUTPUT/heads/DIGEST.safetensors        the classifiers of the runs, see stored_heads
OUTPUT/starting/DIGEST/lease/*.json     the driver that is about to start a run; removed once it holds the run
OUTPUT/runs/RUN_ID/plan.json            written first
                   predictions/*.parquet
                   quarantine/*.parquet
                   receipts/*.json      one for each part, written after its files
                   lease/*.json         the driver that works on the run
                   reused.json          written when the predictions of an earlier run are copied
                   run.json             written last: the commit record
                   readers/NAME.json    a reader that asks to keep the run, {"until": TIME}
                   removal.json         written first by a removal, and deleted last together with lease/
"""

import secrets
from datetime import UTC, datetime

from batchcls.storage.filesystem import join

PLAN = "plan.json"
RUN = "run.json"
CURRENT = "current.json"
RUNS = "runs"
STARTING = "starting"
PREDICTIONS = "predictions"
QUARANTINE = "quarantine"
READERS = "readers"
RECEIPTS = "receipts"
REPORT = "report.html"
LEASE = "lease"
REUSED = "reused.json"
REMOVAL = "removal.json"


def new_run_id(now: datetime | None = None) -> str:
    """A unique name that sorts by time: 20261122-033000-4f2a."""
    return f"{now or datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_folder(output: str, run_id: str) -> str:
    """URI of the folder of a run."""
    return join(output, RUNS, run_id)
