import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.growth_model import (
    Catalog,
    Costs,
    Node,
    Point,
    check_table,
    predict,
    predicted_rate,
    read_points,
    report,
    stage_rates,
)
from tests.conftest import REPOSITORY

FREE_DRIVER = Costs(driver_seconds_per_fragment=0.0, driver_seconds_per_block=0.0)


def test_one_node_matches_a_calculation_by_hand():
    prediction = predict(1, Catalog(rows=9_000_000), Node(), Costs(start_seconds=0.0))
    assert prediction.images_per_second == 20_000  # 8 GPUs x 2,500
    assert prediction.limited_by == "GPUs"
    assert prediction.gpu_busy == 1.0
    seconds = 9_000_000 / 20_000 + 9 * 1.4
    assert prediction.hours * 3600 == pytest.approx(seconds, abs=3)
    assert prediction.files == 450
    assert prediction.cpus_per_gpu == pytest.approx(2500 * (1 / 515 + 0.0006))


@given(st.integers(1, 100))
def test_throughput_is_linear_in_nodes_without_driver_costs(nodes: int):
    prediction = predict(nodes, costs=FREE_DRIVER)
    assert prediction.efficiency == pytest.approx(1.0)
    assert prediction.images_per_second == pytest.approx(nodes * 20_000)


@given(st.integers(1, 1000))
def test_throughput_increases_with_nodes_up_to_the_limit_of_the_driver(nodes: int):
    bound = 1024 / (0.005 + 8 * 0.005)
    assert predict(nodes).images_per_second <= predict(nodes + 1).images_per_second <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("costs", "node", "limited_by"),
    [
        (replace(FREE_DRIVER, decode_seconds=0.1), Node(), "CPUs"),
        (replace(FREE_DRIVER, fetch_seconds=10.0), Node(), "fetch slots"),
        (FREE_DRIVER, Node(store_bytes_per_second=1e6), "bandwidth of the store"),
        (Costs(driver_seconds_per_block=1.0), Node(), "driver"),
    ],
)
def test_every_stage_can_saturate(costs: Costs, node: Node, limited_by: str):
    assert predict(4, node=node, costs=costs).limited_by == limited_by


def test_driver_memory_for_ids_is_limited():
    small, large = (predict(1, Catalog(rows=rows)) for rows in (1_000_000, 1_000_000_000))
    ids_and_base = 400 * 2**20 + 1e9
    assert large.driver_bytes == pytest.approx(ids_and_base + large.fragments * 2000 + large.files * 2000)
    assert small.driver_bytes < 700 * 2**20


def test_measured_points_are_compared_with_the_model(tmp_path: Path):
    path = tmp_path / "growth.json"
    points = [
        {"nodes": 1, "images_per_second": 98.0, "stub_images_per_second": 100.0},
        {
            "nodes": 4,
            "images_per_second": 270.0,
            "stub_images_per_second": 100.0,
            "ideal_images_per_second": 300,
        },
    ]
    path.write_text(json.dumps({"date": "2026-11-24", "points": points}))
    one, four = read_points(path)
    assert (predicted_rate(one), predicted_rate(four)) == (100.0, 300)
    lines = check_table([four, one]).splitlines()
    assert lines[-2] == "| 1 | 100 | 100 | 98 | 0.98 | 100% |"
    assert lines[-1] == "| 4 | 100 | 300 | 270 | 0.90 | 69% |"


def test_simulated_nodes_are_also_limited_by_the_driver():
    assert predicted_rate(Point(4, 1.0, 1e6)) == pytest.approx(1024 / 0.045)


def test_stage_without_costs_has_no_limit():
    costs = replace(FREE_DRIVER, fetch_seconds=0.0, decode_seconds=0.0, write_seconds=0.0, other_seconds=0.0)
    rates = stage_rates(1, Catalog(), Node(), costs)
    assert [stage for stage, rate in rates.items() if math.isinf(rate)] == ["CPUs", "fetch slots", "driver"]


def test_document_contains_the_tables_of_the_model():
    document = (REPOSITORY / "docs" / "explanation" / "scaling.md").read_text()
    for part in report().split("\n\n"):
        assert part in document, (
            "run `python -m benchmarks.growth_model` and copy its tables to docs/explanation/scaling.md"
        )
