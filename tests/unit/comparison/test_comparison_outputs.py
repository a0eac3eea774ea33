import io
import json
from dataclasses import replace
from datetime import UTC, datetime

import duckdb
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from batchcls.cli.comparison_tables import comparison_progress, results_table
from batchcls.comparison.candidates import BenchmarkEnvironment, Candidate
from batchcls.comparison.comparison_outputs import SCHEMA, ComparisonSummary, to_table, write_outputs
from batchcls.comparison.recommend import Requirements, recommend
from batchcls.comparison.runner import Skipped
from batchcls.errors import InputError
from batchcls.models.engines.engine import EngineChoice
from batchcls.storage.filesystem import Storage
from tests.helpers.measurements import LAPTOP, SERVER, measurement

MEASUREMENTS = (
    measurement("vgg16", p50=600.0, right=None, published_top1=0.716),
    measurement("resnet50", right=240),
    measurement("resnet50", engine="torch bf16", p50=60.0, right=240),
)
ENVIRONMENT = BenchmarkEnvironment(SERVER, "cpu", 8, (1, 8), True, 10.0)


def _shown(width, price=None):
    out = io.StringIO()
    Console(file=out, width=width).print(results_table(MEASUREMENTS, price, width))
    return [line.split() for line in out.getvalue().splitlines()]


def test_table_has_a_row_per_batch_size():
    table = to_table(MEASUREMENTS, price_per_hour=None)
    assert table.schema == SCHEMA
    assert table.num_rows == sum(len(entry.throughput) for entry in MEASUREMENTS)
    assert table.column("cost_per_million").null_count == table.num_rows
    rows = [row for row in table.to_pylist() if row["model"] == "vgg16"]
    assert [row["batch_size"] for row in rows] == [1, 8]
    assert [row["best_batch"] for row in rows] == [False, True]
    assert (rows[0]["top1"], rows[0]["published_top1"]) == (None, 0.716)
    assert (rows[0]["p50_ms"], rows[0]["latency_repeats"], rows[0]["repeats"]) == (600, 100, 12)


def test_cost_depends_on_the_throughput_of_the_row():
    rows = to_table(MEASUREMENTS, price_per_hour=3.6).to_pylist()
    for row in rows:
        assert row["cost_per_million"] == pytest.approx(1000 / row["images_per_second"])


def test_terminal_sorts_by_accuracy_and_marks_published_values():
    header, *rows = _shown(140, price=3.6)
    assert header[:3] == ["model", "engine", "top-1"]
    assert header[-1] == "cost/M"
    assert [row[:4] for row in rows] == [
        ["resnet50", "torch", "bf16", "80.0%"],
        ["resnet50", "torch", "fp32", "80.0%"],
        ["vgg16", "torch", "fp32", "71.6%*"],
    ]


def test_narrow_terminal_shows_only_the_essential_columns():
    wide, narrow = _shown(140), _shown(80)
    assert len(narrow[0]) < len(wide[0])
    assert not any("…" in cell for row in narrow for cell in row)
    assert "cost/M" not in wide[0]


def test_progress_bar_appears_only_on_a_terminal():
    candidate = Candidate("resnet50", "f", EngineChoice("torch", "bf16"), ENVIRONMENT)
    shown = []
    for is_terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=is_terminal, width=120)
        with comparison_progress(console, 2) as on_start:
            on_start(candidate)
        shown.append(out.getvalue())
    assert "resnet50, torch bf16 on cpu" in shown[0]
    assert shown[1].strip() == ""


@pytest.fixture
def summary():
    other = tuple(entry.model_copy(update={"hardware": LAPTOP}) for entry in MEASUREMENTS[:1])
    by_hardware = {SERVER.key: MEASUREMENTS[1:], LAPTOP.key: other}
    requirements = Requirements(price_per_hour=3.6)
    failed = Candidate("vit_b_16", "f", EngineChoice("torch", "fp16"), ENVIRONMENT)
    return ComparisonSummary(
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        settings={"models": ["resnet50"]},
        sample="5a",
        requirements=requirements,
        by_hardware=by_hardware,
        recommendations={key: recommend(entries, requirements) for key, entries in by_hardware.items()},
        skipped=[Skipped(failed, InputError("fp16 is for GPUs"))],
    )


def test_writes_all_outputs_with_a_recommendation_per_hardware(summary, tmp_path):
    written = write_outputs(summary, "<p>page</p>", str(tmp_path), Storage())
    assert [path.rpartition("/")[2] for path in written] == [
        "measurements.parquet",
        "compare.html",
        "recommendation.json",
    ]
    assert (tmp_path / "compare.html").read_text() == "<p>page</p>"
    assert pq.read_schema(tmp_path / "measurements.parquet").remove_metadata() == SCHEMA
    query = f"select count(distinct hardware_key), max(top1) from '{tmp_path}/measurements.parquet'"
    assert duckdb.sql(query).fetchall() == [(2, 0.8)]
    record = json.loads((tmp_path / "recommendation.json").read_text())
    assert {key: found["model"] for key, found in record["recommendations"].items()} == {
        SERVER.key: "resnet50",
        LAPTOP.key: "vgg16",
    }
    assert record["skipped"][0]["reason"] == "fp16 is for GPUs"
    assert record["created"] == "2026-01-02T03:04:05+00:00"


def test_rejects_an_output_that_cannot_be_written(summary, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_outputs(replace(summary, skipped=()), "", str(tmp_path / "file"), Storage())
