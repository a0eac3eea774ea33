"""`classify` on a cluster whose nodes join, are drained and are killed while it runs."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.night import Night, published, record
from tests.helpers.nodes import ThreeNodes
from tests.helpers.slow_images import SlowImages

SECONDS_PER_IMAGE, FETCH_THREADS = 0.4, 4  # ten images per second and node
MAX_SECONDS = 60

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def images() -> Iterator[SlowImages]:
    with SlowImages(SECONDS_PER_IMAGE) as server:
        yield server


@pytest.fixture
def head(clean_environment: dict[str, str]) -> Iterator[ThreeNodes]:
    """A cluster with one node, to which a test adds another one."""
    nodes = ThreeNodes(clean_environment, others=0)
    try:
        yield nodes
    finally:
        nodes.end()


FP32 = ("--engine", "torch", "--precision", "fp32")  # skips engine measurements


def start(nodes: ThreeNodes, images: SlowImages, rows: int, model: str, folder: Path, *engine: str) -> Night:
    images.requests.clear()
    return Night(
        nodes,
        folder / "out",
        *("--manifest", images.write_manifest(folder, rows), "--model", model, "--allow-private-addresses"),
        *("--fetch-threads", str(FETCH_THREADS), "--fragment-rows", "64", "--cpus-per-actor", "1"),
        *("--use-head", "--no-report", *(engine or FP32)),
    )


def stored(night: Night) -> list[dict[str, Any]]:
    """Return the receipts on storage in the order in which they were written."""
    found = [json.loads(path.read_text()) for path in night.output.glob("runs/*/receipts/*.json")]
    return sorted(found, key=lambda receipt: receipt["written_at"])


def node_of(receipt: dict[str, Any]) -> str:
    (worker,) = receipt["workers"]
    return str(worker["node"])


def wait_for(night: Night, node: str, receipts: int, seconds: float = 180) -> None:
    """Wait until a node has written a number of receipts."""
    deadline = time.monotonic() + seconds
    while sum(node_of(receipt) == node for receipt in stored(night)) < receipts:
        assert not night.ends_within(0.2), night.text
        assert time.monotonic() < deadline, night.text


def longest_gap(night: Night) -> float:
    """Return the longest time in seconds between two receipts."""
    times = [receipt["written_at"] for receipt in stored(night)]
    return max(later - earlier for earlier, later in pairwise(times))


def check_rows(night: Night, rows: int) -> None:
    """Check that every row was published once, and that run.json says which node and engine processed it."""
    assert night.exit_code() == 0, night.text
    assert published(night.output).column("row").to_pylist() == list(range(rows))
    assert "raylet" not in night.text, "a message of Ray itself on the terminal"
    expected: Counter[tuple[str, str, str]] = Counter()
    for receipt in stored(night):
        (worker,) = receipt["workers"]
        expected[worker["node"], worker["engine"], worker["precision"]] += worker["rows"]
    listed = {(w["node"], w["engine"], w["precision"]): w["rows"] for w in record(night.output)["workers"]}
    assert sum(listed.values()) == rows
    assert listed.keys() == expected.keys()
    assert all(listed[worker] <= expected[worker] for worker in listed)


def start_on_two_nodes(head: ThreeNodes, images: SlowImages, model: str, folder: Path) -> tuple[Night, str]:
    """Start a run, let a node join, and return the run and the id of the node when it has written a fragment.

    The node joins after the job has started, so that the job does not connect to it.
    """
    (first,) = head.ids()
    night = start(head, images, 1600, model, folder)
    wait_for(night, first, 1)
    head.others.append(head.add())
    (second,) = head.ids() - {first}
    wait_for(night, second, 1)
    return night, second


def test_a_node_that_joins_takes_fragments_within_a_minute(
    head: ThreeNodes, images: SlowImages, tiny_bundle: str, tmp_path: Path
):
    (first,) = head.ids()
    night = start(head, images, 1600, tiny_bundle, tmp_path)
    wait_for(night, first, 1)
    head.others.append(head.add())
    joined = time.time()
    (second,) = head.ids() - {first}
    wait_for(night, second, 1)
    written = next(receipt["written_at"] for receipt in stored(night) if node_of(receipt) == second)
    check_rows(night, 1600)
    print(f"first receipt {written - joined:.1f} s after the node joined")
    assert written - joined < MAX_SECONDS
    assert re.search(rf"node \S+ \({second[:8]}\) joined with 1 CPUs", night.text)


def test_a_node_that_is_drained_returns_its_work(
    head: ThreeNodes, images: SlowImages, tiny_bundle: str, tmp_path: Path
):
    night, second = start_on_two_nodes(head, images, tiny_bundle, tmp_path)
    head.drain(second, 40, "spot notice")
    drained = time.monotonic()
    while time.monotonic() - drained < 40:
        assert not night.ends_within(1.0), night.text
    last = max(receipt["written_at"] for receipt in stored(night) if node_of(receipt) == second)
    head.kill(head.others[0])
    print(f"the drained node wrote its last receipt {time.time() - last:.1f} s before its deadline")
    check_rows(night, 1600)
    print(f"longest gap {longest_gap(night):.1f} s")
    assert longest_gap(night) < MAX_SECONDS
    assert re.search(rf"node \S+ \({second[:8]}\) is being drained, it leaves in \d+ s", night.text)
    assert re.search(rf"\({second[:8]}\) left the cluster, .*; nothing was in progress on it", night.text)
    assert set(images.requests.values()) == {1}, "an image was fetched twice"


def test_only_the_fragments_of_a_killed_node_are_processed_again(
    head: ThreeNodes, images: SlowImages, tiny_bundle: str, tmp_path: Path
):
    night, second = start_on_two_nodes(head, images, tiny_bundle, tmp_path)
    head.kill(head.others[0])
    check_rows(night, 1600)
    print(f"longest gap {longest_gap(night):.1f} s")
    assert longest_gap(night) < MAX_SECONDS
    line = re.search(
        rf"\({second[:8]}\) left the cluster, .*; processing again what was in progress there: \d fragments? "
        r"\(rows (.*)\)",
        night.text,
    )
    assert line, night.text
    again = [range(int(low), int(high) + 1) for low, high in re.findall(r"(\d+) to (\d+)", line[1])]
    repeated = {int(path[1:-4]) for path, count in images.requests.items() if count > 1}
    assert repeated
    assert repeated <= {row for rows in again for row in rows}


def test_a_kind_of_node_that_joins_runs_the_reference_and_is_named(
    clean_environment: dict[str, str], images: SlowImages, tiny_bundle: str, tmp_path: Path
):
    # A node with one of the cores of this machine is another kind of hardware than one with all of them.
    nodes = ThreeNodes(clean_environment, others=0, within=("taskset", "--cpu-list", "0"))
    try:
        (first,) = nodes.ids()
        night = start(
            nodes,
            images,
            1000,
            tiny_bundle,
            tmp_path,
            *(
                "--engine",
                "openvino",
                "--precision",
                "auto",
                "--autotune-min-rows",
                "1",
                "--calibration-seconds",
                "5",
            ),
        )
        wait_for(night, first, 1)
        nodes.others.append(nodes.add())
        (second,) = nodes.ids() - {first}
        wait_for(night, second, 1)
        check_rows(night, 1000)
    finally:
        nodes.end()
    by_node = {worker["node"]: worker for worker in record(night.output)["workers"]}
    assert by_node[second]["precision"] == "fp32"
    settings = record(night.output)["result_settings"]
    assert set(settings["precisions"]) >= {by_node[first]["precision"], "fp32"}
    assert night.text.count("a node joined whose engine was not measured (1 x ") == 1
