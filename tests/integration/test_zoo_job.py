"""`classify` with every backbone of the zoo: 32 drawn images, random weights.

Not part of `make test`: `make long` takes about half an hour on two cores and prints a table.
"""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.models.registry import zoo_records
from tests.helpers.drawing import draw, encode

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ROWS = 32


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(ROWS):
        (folder / f"{index}.jpg").write_bytes(encode(draw(index, 500, 375), "JPEG", quality=90))
    table = pa.table(
        {"item_id": [str(i) for i in range(ROWS)], "uri": [str(folder / f"{i}.jpg") for i in range(ROWS)]}
    )
    pq.write_table(table, folder / "manifest.parquet")
    return folder / "manifest.parquet"


@pytest.fixture(scope="module")
def results():
    """Rows of a table with the time and memory of each backbone, printed at the end for docs/measurements."""
    lines: list[str] = []
    yield lines
    print("\n| backbone | job, s | forward pass, s per image | memory of the actor, MiB |\n|---|---|---|---|")
    print("\n".join(lines))


@pytest.mark.parametrize("name", [record.name for record in zoo_records()])
def test_zoo_backbone_classifies(name, job, manifest, results):
    started = time.perf_counter()
    outcome = job("--manifest", str(manifest), "--model", name, "--allow-random-weights")
    seconds = time.perf_counter() - started
    assert outcome.exit_code == 0, outcome.log
    record = outcome.record
    assert (record["counts"]["rows"], record["counts"]["predicted"]) == (ROWS, ROWS)
    dimension = outcome.predictions.schema.field("embedding").type.list_size
    assert dimension >= 384
    assert not (outcome.output / "current.json").exists()
    forward = record["stage_seconds"]["predict"] / ROWS
    results.append(
        f"| {name} | {seconds:.0f} | {forward:.3f} | {record['measurements']['peak_memory_mib_of_an_actor']:.0f} |"
    )
