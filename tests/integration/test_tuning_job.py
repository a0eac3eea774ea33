"""`finetune --tune` on a real cluster: a search that is interrupted, resumed and continued with more trials."""

import re
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchcls.jobs import finetune
from tests.helpers.finetuning import Catalog, lineage, start, wait_for_line
from tests.integration.conftest import Cluster, run_here


def reported(printed: str) -> set[int]:
    """The trials of which an epoch was reported."""
    return {int(number) for number in re.findall(r"trial (\d+) of \d+: epoch", printed)}


@pytest.mark.long
def test_recipe_that_cannot_be_trained_is_rejected(
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    arguments = [*training_catalog.arguments, "--output", str(tmp_path / "bundle"), "--tune", "2"]
    arguments[arguments.index("--recipe") + 1] = "fine-tune"
    exit_code, printed = run_here(
        cluster, finetune, *arguments, "--micro-batch-size", "1", "--max-failures", "0"
    )
    assert (exit_code, "the recipe mixes the images of a micro-batch" in printed) == (2, True), printed
    assert not (tmp_path / "bundle").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_interrupted_search_is_resumed_and_continued(
    training_catalog: Catalog, cluster: Cluster, tmp_path: Path
):
    output, work = tmp_path / "bundle", tmp_path / "work"
    arguments = ("--work-dir", str(work), "--max-workers", "1", "--keep-pixels")
    process = start(cluster, training_catalog, output, *arguments, "--tune", "3")
    log = output.with_suffix(".log")
    wait_for_line(process, log, r"trial 1 of 3 finished after 8 of 8 epochs")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert "run the same command again to resume" in log.read_text()
    assert not output.exists()
    before = pq.read_table(work / "tuning.parquet").to_pylist()
    assert before[0]["trial"] == 1

    command = (cluster, finetune, *training_catalog.arguments, *arguments)
    exit_code, printed = run_here(*command, "--output", str(output), "--tune", "3")
    assert exit_code == 0, printed
    assert reported(printed).isdisjoint(row["trial"] for row in before)
    table = pq.read_table(work / "tuning.parquet").to_pylist()
    assert [row["trial"] for row in table] == [1, 2, 3]
    assert [row for row in table if row in before] == before
    assert not (work / "tuning").exists()

    made = lineage(output)
    tuning = made["tuning"]
    assert sum(tuning["trials"].values()) == 3
    assert tuning["held_out_rows"] == len(table[0]["row_losses"]) == 12
    assert made["history"][0]["images"] == 60, "the final training uses all images"
    assert len(made["history"]) == tuning["chosen"]["epochs"]
    chosen = table[tuning["chosen_trial"] - 1]
    assert {name: chosen[name] for name in tuning["chosen"]} == tuning["chosen"]
    is_better = tuning["gain"] > tuning["gain_error"]
    assert tuning["chosen_trial"] == (tuning["best_trial"] if is_better else 1)

    exit_code, printed = run_here(*command, "--output", str(tmp_path / "longer"), "--tune", "4")
    assert exit_code == 0, printed
    assert reported(printed) == {4}
    assert pq.read_table(work / "tuning.parquet").to_pylist()[:3] == table
