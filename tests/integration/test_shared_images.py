"""Images that several rows share are predicted once per worker process in both graphs, with the same rows."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.jobs import runs
from tests.helpers.started import write_catalog
from tests.integration.conftest import Outcome

ROWS = 300


@pytest.mark.long
@pytest.mark.parametrize("shape", ["fused", "staged"])
def test_shared_images_are_predicted_once_with_the_same_rows(
    job: Callable[..., Outcome], tiny_bundle: str, tmp_path: Path, shape: str
):
    catalog = write_catalog(tmp_path / "catalog", ROWS, broken=(2,))
    table = pq.read_table(catalog)
    uris = [f"{n % 3}.jpg" if n % 10 < 4 else f"{n}.jpg" for n in range(ROWS)]
    table = table.set_column(table.schema.get_field_index("uri"), "uri", pa.array(uris))
    pq.write_table(table, catalog, row_group_size=ROWS)
    failed = sum(uri == "2.jpg" for uri in uris)
    arguments = ("--manifest", catalog, "--model", tiny_bundle, "--shape", shape, "--batch-size", "8")
    arguments += ("--fragment-rows", "60", "--max-failed-fraction", "1", "--reuse", "none", "--no-report")

    results, counts = {}, {}
    for name, more in (("plain", ("--no-share-predictions",)), ("shared", ())):
        outcome = job(*arguments, *more, "--run-id", name, "--no-publish")
        assert outcome.exit_code == 0, outcome.log
        folder = outcome.output / "runs" / name
        counts[name] = json.loads((folder / "run.json").read_text())["counts"]
        results[name] = pq.read_table(folder / "predictions").sort_by("row")
        assert run("runs", runs.COMMANDS, ["verify", name, "--output", str(outcome.output)]) == 0
    assert (counts["plain"]["predicted"], counts["plain"]["shared"]) == (ROWS - failed, 0)
    assert counts["shared"]["predicted"] + counts["shared"]["shared"] == ROWS - failed
    assert counts["shared"]["quarantined_by_reason"] == {"truncated": failed}
    # 180 images occur once, and two occur 40 times each; each of up to five fragments may predict both.
    assert 182 <= counts["shared"]["predicted"] <= 190
    plain, shared = results["plain"], results["shared"]
    exact = ["row", "item_id", "uri", "label", "width", "height", "content_hash", "source_version"]
    assert shared.select(exact).equals(plain.select(exact))
    for name in ("probability", "embedding"):
        one, two = (np.stack(t.column(name).to_pandas()).astype(np.float32) for t in (plain, shared))
        np.testing.assert_allclose(one, two, atol=1e-2 if name == "embedding" else 1e-5)
    by_content: dict[str, dict] = {}
    for row in shared.select(["content_hash", "label", "probability", "top_k"]).to_pylist():
        assert abs(by_content.setdefault(row["content_hash"], row)["probability"] - row["probability"]) < 1e-5
