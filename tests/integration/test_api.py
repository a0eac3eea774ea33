"""The Python API on the test cluster: a process that is connected to Ray classifies, and stays connected."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from ray._private.authentication_test_utils import reset_auth_token_state

import batchcls
from batchcls.runs.catalog import read_current
from batchcls.storage.filesystem import Storage
from tests.helpers.started import write_catalog
from tests.integration.conftest import Cluster


@pytest.fixture
def connected(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, cluster.environment[variable])
    reset_auth_token_state()  # Ray read both when it was imported
    ray.init(cluster.address, log_to_driver=False)
    yield
    ray.shutdown()


def test_connected_process_classifies_resumes_and_fails_gates(
    connected: None, tiny_bundle: str, tmp_path: Path
):
    catalog = write_catalog(tmp_path, 20, broken=(3,))
    output = tmp_path / "output"
    run = batchcls.classify(Path(catalog), tiny_bundle, output, top_k=2, max_failed_fraction=1.0)
    assert ray.is_initialized()
    assert run.published
    assert read_current(str(output), Storage()) == run.run_id
    assert run.counts.rows == pq.read_metadata(catalog).num_rows
    predictions = run.predictions().to_table()
    assert predictions.num_rows == run.counts.predicted
    assert {len(row) for row in predictions["top_k"].to_pylist()} == {2}
    assert run.quarantine().count_rows() == run.counts.quarantined
    assert Path(run.report or "").is_file()

    with pytest.raises(batchcls.PublishRefused, match="gate mean_confidence") as caught:
        batchcls.classify(
            *(catalog, tiny_bundle, output),
            top_k=3,
            max_failed_fraction=1.0,
            gate_min_rows=1,
            gate_min_mean_confidence=1.0,
            report=False,
            show_progress=False,
        )
    rejected = caught.value.run
    assert rejected is not None
    assert not rejected.published
    assert rejected.counts.rows == run.counts.rows
    assert rejected.counts.quarantined == run.counts.quarantined
    # More labels of each prediction follow from the stored embeddings.
    assert rejected.counts.reheaded == run.counts.with_prediction
    assert "mean_confidence" in {gate.gate for gate in rejected.gates if not gate.passed}
    assert batchcls.open_run(output).run_id == run.run_id

    with pytest.raises(batchcls.InputError, match="already connected to Ray"):
        batchcls.classify(catalog, tiny_bundle, tmp_path / "other", ray_address="local")
    assert not (tmp_path / "other").exists()
