"""The queue of fragments without Ray: each is taken once, unless the process or the node that has it is lost."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.pipeline.ray_data.fragment_queue import FragmentQueue, FragmentSource
from batchcls.resources import NodeResources, plan_resources
from batchcls.schema import Failure, Reason
from batchcls.storage.filesystem import Storage

ROWS = 3000
STORAGE = Storage({})
CRASHING = {5: Failure(Reason.DECODER_CRASH, "")}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("catalog") / "manifest.parquet"
    columns = {"item_id": ["7", *(str(row) for row in range(1, ROWS))], "uri": ["a.jpg"] * ROWS}
    pq.write_table(pa.table(columns), path)
    return open_manifest(str(path), STORAGE)


@pytest.fixture
def queue_for(manifest: Manifest) -> Callable[..., FragmentQueue]:
    def create(
        rows: int = ROWS, actors: Callable[[], int] = lambda: 1, first_ticket: int = 0
    ) -> FragmentQueue:
        config = ClassifyConfig(manifest="m", output="o", model="m", fragment_rows=1024)
        resources = plan_resources(config, [NodeResources(1, 0)], rows, remote_images=False)
        invalid = find_invalid_ids(manifest, STORAGE)
        source = FragmentSource(manifest, RowRanges.all(rows), invalid, CRASHING, resources, first_ticket)
        return FragmentQueue(source, actors)

    return create


def take_all(queue: FragmentQueue, first_ticket: int = 0) -> list[int]:
    """Take fragments until none waits, and return the numbers of their rows."""
    rows: list[int] = []
    ticket = first_ticket
    while (fragment := queue.take(ticket, "node").fragment) is not None:
        rows += fragment.row_numbers().tolist()
        queue.finish(ticket)
        ticket += 1
    return rows


def test_every_row_is_taken_once(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for()
    assert take_all(queue) == list(range(ROWS))
    assert queue.take(9999, "node").should_wait is False


def test_rows_that_failed_before_are_rejected(queue_for: Callable[..., FragmentQueue]):
    rejected = queue_for().take(0, "node").rejected
    assert {row: failure.reason for row, failure in rejected.items()} == {
        5: Reason.DECODER_CRASH,
        7: Reason.DUPLICATE_ID,
    }


def test_a_retried_ticket_gets_its_fragment_again(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for()
    first = queue.take(0, "a").fragment
    assert queue.take(0, "b").fragment == first
    assert queue.in_progress_on("a") == []
    assert queue.in_progress_on("b") == [first]


def test_fragments_of_a_lost_node_are_taken_next(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for(rows=200)
    lost = [queue.take(ticket, "lost").fragment for ticket in (0, 1)]
    kept = queue.take(2, "kept").fragment
    assert queue.release("lost") == lost
    assert [queue.take(ticket, "kept").fragment for ticket in (3, 4)] == lost
    others = take_all(queue, 5)
    assert kept is not None
    assert sorted(
        [*others, *kept.row_numbers(), *(row for f in lost if f for row in f.row_numbers())]
    ) == list(range(200))
    # The lost process was alive after all, and has finished: its tickets hold nothing any more.
    queue.finish(0)
    assert queue.in_progress_on("kept") == [kept, *lost]


def test_a_ticket_waits_while_a_fragment_may_be_returned(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for(rows=64)
    fragment = queue.take(0, "a").fragment
    turn = queue.take(1, "b")
    assert (turn.fragment, turn.should_wait) == (None, True)
    queue.release("a")
    assert queue.take(1, "b").fragment == fragment
    queue.finish(1)
    assert not queue.take(2, "b").should_wait


def test_a_draining_node_gets_no_fragment(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for()
    first = queue.take(0, "leaving").fragment
    queue.drain("leaving")
    turn = queue.take(1, "leaving")
    assert (turn.fragment, turn.should_wait) == (None, False)
    assert queue.in_progress_on("leaving") == [first]
    # Its process crashed and is started again on the same node: another node takes the fragment.
    assert queue.take(0, "leaving").fragment is None
    assert queue.take(2, "other").fragment == first


def test_fragments_become_smaller_when_the_pool_grows(queue_for: Callable[..., FragmentQueue]):
    actors = [1]
    queue = queue_for(actors=lambda: actors[0])
    sizes = []
    for ticket in range(3):
        fragment = queue.take(ticket, "node").fragment
        assert fragment is not None
        sizes.append(fragment.rows)
    assert sizes == [64, 128, 256]
    actors[0] = 8
    fragment = queue.take(3, "node").fragment
    assert fragment is not None
    assert fragment.rows <= (ROWS - sum(sizes)) // (4 * 8) + 1


def test_tickets_of_an_earlier_execution_get_nothing(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for(first_ticket=10)
    turn = queue.take(9, "node")
    assert (turn.fragment, turn.should_wait) == (None, False)
    assert queue.take(10, "node").fragment is not None
