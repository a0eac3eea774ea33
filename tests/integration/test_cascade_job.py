"""A cascade in both graphs of Ray Data: the rows of each network, its counts, its metrics and its report."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from batchcls.schema import LARGE, SMALL
from tests.helpers.cascades import write_varied_bundle
from tests.helpers.started import write_catalog
from tests.integration.conftest import Outcome, OwnCluster

Job = Callable[..., Outcome]
ROWS, BROKEN = 150, (0, 77)


@pytest.mark.long  # tests/unit/jobs/test_cascade.py runs the same job in one process
@pytest.mark.timeout(900)
def test_both_graphs_send_the_same_rows_to_the_large_network(job: Job, cluster: OwnCluster, tmp_path: Path):
    small = write_varied_bundle(tmp_path / "small", 1, 64)
    large = write_varied_bundle(tmp_path / "large", 2, 80)
    manifest = write_catalog(tmp_path / "catalog", ROWS, broken=BROKEN)
    common = ("--manifest", manifest, "--max-failed-fraction", "0.1", "--embedding-dtype", "float32")
    common += ("--precision", "fp32")
    measured = (
        "--autotune-min-rows",
        "100",
        "--calibration-seconds",
        "0.5",
        "--cache-dir",
        str(tmp_path / "cache"),
    )
    alone = job(*common, "--model", small, output=tmp_path / "alone").predictions
    threshold = float(np.median(alone.column("probability").to_numpy()))
    found: dict[str, pa.Table] = {}
    for shape, more in (("fused", measured), ("staged", ())):
        outcome = job(
            *(*common, "--model", f"{small},{large}", "--cascade", str(threshold), "--shape", shape),
            *("--fragment-rows", "40", *more),
            output=tmp_path / shape,
        )
        assert outcome.exit_code == 0, outcome.log
        found[shape] = outcome.predictions
        networks = outcome.predictions.column("predicted_by").to_pylist()
        rows = {name: networks.count(name) for name in (SMALL, LARGE)}
        assert rows[LARGE] == (alone.column("probability").to_numpy() < threshold).sum()
        assert outcome.record["counts"]["by_network"] == rows
        workers = {worker["model"]: worker["rows"] for worker in outcome.record["workers"]}
        assert workers == {SMALL: ROWS, LARGE: rows[LARGE]}
        assert outcome.record["stage_seconds"]["predict_large"] > 0
        # Each network has its own selection of the engine.
        selections = outcome.record["measurements"]["engine_selections"]
        assert len({found["bundle_fingerprint"] for found in selections}) == (2 if more else 0)
        name = outcome.folder.name
        if shape == "staged":  # whose metrics workers export; a later connection of this process counts twice
            assert cluster.wait_for_counter(name, "batchcls_network_rows", "network", rows) == rows
        assert "by the large network" in (outcome.folder / "report.html").read_text()
        assert "predict_large" in outcome.log
    for name in ("row", "item_id", "label", "predicted_by"):
        assert found["fused"].column(name).equals(found["staged"].column(name)), name
    embeddings = [np.array(table.column("embedding").to_pylist()) for table in (found["staged"], alone)]
    np.testing.assert_allclose(*embeddings, atol=1e-3)
