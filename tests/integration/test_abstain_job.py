"""`classify --abstain` with and without a calibrated bundle: temperature, null labels and counts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchcls.models.model_bundle import Bundle, Calibration, HeldOut
from batchcls.storage.filesystem import Storage
from tests.helpers.started import write_catalog
from tests.integration.conftest import Outcome

Job = Callable[..., Outcome]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_catalog(tmp_path_factory.mktemp("catalog"), 60, broken=(5,))


@pytest.mark.parametrize("shape", ["fused", pytest.param("staged", marks=pytest.mark.long)])
def test_rows_below_threshold_have_null_label(
    job: Job, tiny_bundle: str, catalog: str, tmp_path: Path, shape: str
):
    """The thresholds equal the median of the calibrated probabilities, so that about half of the rows abstain."""
    given = ("--manifest", catalog, "--max-failed-fraction", "0.1")
    plain = job(*given, "--model", tiny_bundle, "--top-k", "10", output=tmp_path / "plain")
    logits = np.log(
        [[e["probability"] for e in top] for top in plain.predictions.column("top_k").to_pylist()]
    )
    cooled = np.exp(logits / 0.25)
    expected = (cooled / cooled.sum(axis=1, keepdims=True))[:, 0]
    threshold = float(np.median(expected)) + 1e-6
    calibration = Calibration(
        temperature=0.25,
        ece_before=0.2,
        ece_after=0.1,
        target_precision=0.9,
        thresholds=(threshold,) * 10,
        held_out=HeldOut(rows=60, precision=0.9, coverage=0.5),
        rows=60,
        manifest_fingerprint="f",
    )
    bundle = Bundle.load(tiny_bundle, Storage())
    calibrated = replace(bundle, config=bundle.config.model_copy(update={"calibration": calibration}))
    calibrated.save(str(tmp_path / "calibrated"), Storage())
    found = job(
        *given,
        "--model",
        str(tmp_path / "calibrated"),
        "--abstain",
        "--shape",
        shape,
        output=tmp_path / shape,
    )
    assert found.exit_code == 0, found.log
    table = found.predictions
    np.testing.assert_allclose(table.column("probability").to_numpy(), expected, rtol=2e-3)
    is_confident = table.column("probability").to_numpy() >= threshold
    assert 20 < is_confident.sum() < 40
    assert (table.column("label").is_valid().to_numpy() == is_confident).all()
    assert table.column("reason").to_pylist() == [None if row else "below_threshold" for row in is_confident]
    assert table.column("top_k").null_count == 0
    counts = found.record["counts"]
    assert (counts["rows"], counts["predicted"], counts["quarantined"]) == (60, 59, 1)
    assert counts["abstained"] == int((~is_confident).sum())
    assert "below_threshold" in found.log


def test_bundle_without_thresholds_is_rejected(job: Job, tiny_bundle: str, catalog: str, tmp_path: Path):
    found = job("--manifest", catalog, "--model", tiny_bundle, "--abstain")
    assert found.exit_code == 2
    assert "--write-bundle" in found.log
    assert not (tmp_path / "output").exists()
