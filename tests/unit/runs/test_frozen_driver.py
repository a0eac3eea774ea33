"""A driver that is stopped by a signal and resumed late never replaces a newer published run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from batchcls.runs.catalog import list_run, read_current
from batchcls.runs.publish import publish
from batchcls.storage.filesystem import Storage
from tests.conftest import REPOSITORY
from tests.helpers.runs import RunDetails, items, set_created, start_run, write_run
from tests.helpers.tiers import long_except

DRIVER = """
import os, signal, sys
from batchcls.config.gates_config import GateSettings
from batchcls.errors import BatchclsError
from batchcls.runs import publish
from batchcls.runs.commit import commit, reconcile
from batchcls.runs.gate_evaluation import evaluate_gates, publish_if_passed
from batchcls.runs.gates import Limits
from batchcls.runs.records import Measurements
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import RunDetails, items, plan_of, write_parts

output, stops = sys.argv[1:]
storage = Storage()

def at(step):
    global stops
    if step == stops:
        stops = None
        os.kill(os.getpid(), signal.SIGSTOP)

real = publish.compare_and_swap
def stopping_compare_and_swap(*arguments):
    at("before the swap")
    real(*arguments)
publish.compare_and_swap = stopping_compare_and_swap

plan, folder = plan_of(RunDetails("yesterday"), 200), f"{output}/runs/yesterday"
receipts = write_parts(folder, items(100), storage, parts=1)
at("before the last receipt")
receipts = write_parts(folder, items(200), storage)
totals = reconcile(receipts, 200)
decision = evaluate_gates(plan, receipts, totals, Limits(GateSettings(), 0.5), output, storage)
at("before the commit")
commit(plan, receipts, totals, decision.findings(Measurements()), storage, folder)
at("before the publish")
try:
    publish_if_passed(plan, decision, output, storage)
except BatchclsError as error:
    print(error)
    sys.exit(error.exit_code)
"""

STEPS = ("before the last receipt", "before the commit", "before the publish", "before the swap")


@pytest.mark.parametrize(
    ("step", "is_newer"),
    [*long_except({"before the commit"}, ((step, True) for step in STEPS)), ("before the swap", False)],
)
def test_driver_that_is_resumed_late_does_not_replace_a_newer_run(tmp_path: Path, step: str, is_newer: bool):
    """A newer or an even older run is published while yesterday's driver is stopped."""
    output = str(tmp_path)
    start_run(output, RunDetails("yesterday"))
    set_created(output, "yesterday", "2026-11-25T01:15:00+00:00")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, output, step], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        _, status = os.waitpid(driver.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        write_run(output, RunDetails("other"), items(200))
        set_created(output, "other", f"2026-11-2{6 if is_newer else 4}T01:15:00+00:00")
        publish(output, "other", Storage())
        driver.send_signal(signal.SIGCONT)
        printed, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
        driver.wait()
    assert list_run(output, "yesterday", Storage()).record is not None
    if is_newer:
        assert (driver.returncode, "before run other, which is published" in printed) == (3, True)
        assert read_current(output, Storage()) == "other"
    else:
        assert (driver.returncode, read_current(output, Storage())) == (0, "yesterday"), printed
