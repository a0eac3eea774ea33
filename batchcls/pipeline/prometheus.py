"""Prometheus metrics of a run, exported by Ray (docs/how-to/clusters.md, "Metrics").

Counters are increased from receipts, in the process that creates or receives them, so that a row counts once it
is on storage. Ray adds the prefix `ray_` to every name and `_total` to a counter's. All tags have few values: the
run, and the closed lists of statuses, reasons, stages and gates.
"""

import time
from collections.abc import Iterable
from functools import cache

from ray.util.metrics import Counter, Gauge

from batchcls.pipeline.progress import Progress
from batchcls.runs.parts import COMPUTED, SHARED, Receipt
from batchcls.runs.records import GateResult

_RUN = "run_id"


class RunMetrics:
    """Metrics of one run in one process."""

    def __init__(self, run_id: str) -> None:
        self._run = {_RUN: run_id}
        self._rows = Counter(
            "batchcls_rows", "Rows on storage, by status: predicted, shared or quarantined.", (_RUN, "status")
        )
        self._networks = Counter(
            "batchcls_network_rows",
            "Rows with a prediction, by the network of a cascade that predicted them: small or large.",
            (_RUN, "network"),
        )
        self._failures = Counter("batchcls_failures", "Rows in quarantine, by reason.", (_RUN, "reason"))
        self._seconds = Counter(
            "batchcls_stage_seconds",
            "Busy seconds by stage, over all workers: wall time of fetch, CPU or GPU time of the other stages.",
            (_RUN, "stage"),
        )
        self._bytes = Counter("batchcls_image_bytes", "Bytes of images fetched.", (_RUN,))
        self._rate = Gauge(
            "batchcls_images_per_second",
            "Finished rows per second since the first worker was ready.",
            (_RUN,),
        )
        self._waiting = Gauge("batchcls_rows_waiting", "Rows of the run that are not finished yet.", (_RUN,))
        self._gates = Counter(
            "batchcls_gate_failures", "Gates that refused to publish a run, by gate.", (_RUN, "gate")
        )

    def record(self, receipt: Receipt) -> None:
        """Count the rows of a part. A write that Ray retries is counted twice; run.json has the exact counts."""
        origins, quarantined = receipt.origins, receipt.failures.total()
        for status, rows in (
            ("predicted", origins[COMPUTED]),
            ("shared", origins[SHARED]),
            ("quarantined", quarantined),
        ):
            if rows:
                self._rows.inc(rows, self._run | {"status": status})
        for network, rows in receipt.by_network.items():
            self._networks.inc(rows, self._run | {"network": network})
        for reason, rows in receipt.failures.items():
            self._failures.inc(rows, self._run | {"reason": reason})
        for stage, seconds in receipt.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, self._run | {"stage": stage})
        if receipt.image_bytes:
            self._bytes.inc(receipt.image_bytes, self._run)

    def record_refusals(self, failed: Iterable[GateResult]) -> None:
        """Count the gates that refuse to publish the run."""
        for gate in failed:
            self._gates.inc(1, self._run | {"gate": gate.gate})

    def report(self, progress: Progress, rows: int) -> None:
        """Set the gauges to the progress of a run with this number of rows."""
        self._waiting.set(rows - progress.rows, self._run)
        if progress.ready_at is not None and progress.rows:
            self._rate.set(progress.rows / max(1e-3, time.time() - progress.ready_at), self._run)


@cache
def metrics_of(run_id: str) -> RunMetrics:
    """Return the metrics of a run, which exist once per process."""
    return RunMetrics(run_id)
