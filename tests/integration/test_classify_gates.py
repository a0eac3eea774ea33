"""Gates of `classify`: a run that fails them is committed, and the published run stays."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from batchcls.cli.app import run
from batchcls.jobs import runs
from tests.helpers.started import start_job, write_catalog
from tests.integration.conftest import Outcome, OwnCluster

Job = Callable[..., Outcome]


def runs_job(*arguments: str) -> tuple[int, str]:
    """Run the job `runs`; return its exit code and standard output."""
    printed = StringIO()
    with redirect_stdout(printed):
        code = run("runs", runs.COMMANDS, arguments)
    return code, printed.getvalue()


def test_run_with_failed_gate_is_committed_and_published_only_with_force(
    job: Job, tiny_bundle: str, tmp_path: Path, cluster: OwnCluster
):
    output = str(tmp_path / "output")
    same = ("--model", tiny_bundle, "--gate-min-rows", "10", "--gate-min-mean-confidence", "0")
    whole = write_catalog(tmp_path / "whole", 40, broken=(3,))
    half = write_catalog(tmp_path / "half", 20)
    budget = ("--max-failed-fraction", "0.1")

    first = job("--manifest", whole, *same, *budget, "--run-id", "night-1", output=output)
    assert first.exit_code == 0, first.log
    record = json.loads((tmp_path / "output/runs/night-1/run.json").read_text())
    gates = {gate["gate"]: gate for gate in record["gates"]}
    assert gates["failed_fraction"]["value"] == 1 / 40
    assert gates["coverage_fraction"]["limit"] == 0.9
    assert "changed_labels_fraction" not in gates
    assert record["summary"]["predictions"] == 39
    assert sum(record["summary"]["categories"].values()) == 39

    second = start_job(cluster, Path(output), "--manifest", half, *same, *budget, "--run-id", "night-2")
    _, log = second.communicate(timeout=200)
    assert second.returncode == 3, log
    assert "gate row_count_change_fraction: 20 rows, 40 in run night-1" in log
    current = json.loads((tmp_path / "output/current.json").read_text())
    assert current["run_id"] == "night-1"
    record = json.loads((tmp_path / "output/runs/night-2/run.json").read_text())
    failed_gates = [gate["gate"] for gate in record["gates"] if not gate["passed"]]
    assert (record["baseline"], failed_gates) == ("night-1", ["row_count_change_fraction"])
    # The metric of the alert about refused runs. The run has its own process, because a process that connects to Ray
    # for the n-th time exports its counters n - 1 times: Ray keeps the exporters of the earlier connections.
    refusing = {"row_count_change_fraction": 1.0}
    counted = cluster.wait_for_counter("night-2", "batchcls_gate_failures", "gate", refusing)
    assert counted == refusing
    assert not any("gate" in tags for _, tags, _ in cluster.metrics() if tags.get("run_id") == "night-1")

    assert runs_job("verify", "night-2", "--output", output)[0] == 0
    assert runs_job("publish", "night-2", "--output", output)[0] == 3

    # The same command evaluates the gates again: it computes nothing and needs no Ray.
    files = {path: path.read_bytes() for path in (tmp_path / "output/runs/night-2").rglob("*.*")}
    command = ("--manifest", half, *same, *budget)
    for more, code in (
        ((), 3),
        (("--run-id", "night-2"), 3),
        (("--gate-max-row-count-change-fraction", "0.4"), 3),
        (("--gate-max-row-count-change-fraction", "0.5", "--no-report"), 0),
    ):
        again = job(*command, *more, output=output)
        assert again.exit_code == code, again.log
        assert "run night-2 is committed and not published" in again.log
        assert "no image is computed" in again.log
        assert "Ray cluster" not in again.log
    assert json.loads((tmp_path / "output/current.json").read_text())["run_id"] == "night-2"
    changed = [path.name for path, data in files.items() if path.read_bytes() != data]
    assert changed == ["report.html"]  # it shows the gates with the other limits
    assert sorted(path.name for path in (tmp_path / "output/runs").iterdir()) == ["night-1", "night-2"]

    assert runs_job("rollback", "--output", output) == (0, "published: night-1, instead of night-2\n")
    assert runs_job("publish", "night-2", "--output", output)[0] == 3
    assert runs_job("publish", "night-2", "--output", output, "--force") == (0, "published: night-2\n")
    assert runs_job("rollback", "--output", output) == (0, "published: night-1, instead of night-2\n")
    code, printed = runs_job("diff", "night-1", "night-2", "--output", output)
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    counts = {words[0]: words[1] for words in lines if len(words) > 1}
    assert (counts["recovered"], counts["gone"], counts["new"]) == ("1", "20", "0")
