"""The queue of fragments without Ray: each is taken once, unless the process or the node that has it is lost.

With the progress actor, which counts how often a fragment was started.
"""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.config.classify_config import ClassifyConfig
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.pipeline.progress import ProgressActor, RepeatedCrashError
from batchcls.pipeline.ray_data.fragment_queue import FragmentQueue, FragmentSource, TicketHolder
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
def source_for(manifest: Manifest) -> Callable[..., FragmentSource]:
    def create(rows: int = ROWS, first_ticket: int = 0) -> FragmentSource:
        config = ClassifyConfig(manifest="m", output="o", model="m", fragment_rows=1024)
        resources = plan_resources(config, [NodeResources(1, 0)], rows, remote_images=False)
        invalid = find_invalid_ids(manifest, STORAGE)
        return FragmentSource(manifest, RowRanges.all(rows), invalid, CRASHING, resources, 2, first_ticket)

    return create


@pytest.fixture
def queue_for(source_for: Callable[..., FragmentSource]) -> Callable[..., FragmentQueue]:
    def create(
        rows: int = ROWS, actors: Callable[[], int] = lambda: 1, first_ticket: int = 0
    ) -> FragmentQueue:
        return FragmentQueue(source_for(rows, first_ticket), actors)

    return create


def on(node: str) -> TicketHolder:
    """Return the only actor of a node."""
    return TicketHolder(f"actor on {node}", node)


def take_all(queue: FragmentQueue, first_ticket: int = 0) -> list[int]:
    """Take fragments until none waits, and return the numbers of their rows."""
    rows: list[int] = []
    ticket = first_ticket
    while (fragment := queue.take(ticket, on("node")).fragment) is not None:
        rows += fragment.row_numbers().tolist()
        queue.finish(ticket)
        ticket += 1
    return rows


def test_every_row_is_taken_once(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for()
    assert take_all(queue) == list(range(ROWS))
    assert queue.take(9999, on("node")).should_wait is False


def test_rows_that_failed_before_are_rejected(queue_for: Callable[..., FragmentQueue]):
    rejected = queue_for().take(0, on("node")).rejected
    assert {row: failure.reason for row, failure in rejected.items()} == {
        5: Reason.DECODER_CRASH,
        7: Reason.DUPLICATE_ID,
    }


def test_a_retried_ticket_gets_its_fragment_again(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for()
    first = queue.take(0, on("a")).fragment
    assert queue.take(0, on("b")).fragment == first
    assert queue.in_progress_on("a") == []
    assert queue.in_progress_on("b") == [first]


def test_fragments_of_a_lost_node_are_taken_next(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for(rows=200)
    lost = [queue.take(ticket, on("lost")).fragment for ticket in (0, 1)]
    kept = queue.take(2, on("kept")).fragment
    assert queue.release("lost") == lost
    assert [queue.take(ticket, on("kept")).fragment for ticket in (3, 4)] == lost
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
    fragment = queue.take(0, on("a")).fragment
    turn = queue.take(1, on("b"))
    assert (turn.fragment, turn.should_wait) == (None, True)
    queue.release("a")
    assert queue.take(1, on("b")).fragment == fragment
    queue.finish(1)
    assert not queue.take(2, on("b")).should_wait


def test_a_draining_node_gets_no_fragment(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for()
    first = queue.take(0, on("leaving")).fragment
    queue.drain("leaving")
    turn = queue.take(1, on("leaving"))
    assert (turn.fragment, turn.should_wait) == (None, False)
    assert queue.in_progress_on("leaving") == [first]
    # Its process crashed and is started again on the same node: another node takes the fragment.
    assert queue.take(0, on("leaving")).fragment is None
    assert queue.take(2, on("other")).fragment == first


def test_fragments_become_smaller_when_the_pool_grows(queue_for: Callable[..., FragmentQueue]):
    actors = [1]
    queue = queue_for(actors=lambda: actors[0])
    sizes = []
    for ticket in range(3):
        fragment = queue.take(ticket, on("node")).fragment
        assert fragment is not None
        sizes.append(fragment.rows)
    assert sizes == [64, 128, 256]
    actors[0] = 8
    fragment = queue.take(3, on("node")).fragment
    assert fragment is not None
    assert fragment.rows <= (ROWS - sum(sizes)) // (4 * 8) + 1


def test_tickets_of_an_earlier_execution_get_nothing(queue_for: Callable[..., FragmentQueue]):
    queue = queue_for(first_ticket=10)
    turn = queue.take(9, on("node"))
    assert (turn.fragment, turn.should_wait) == (None, False)
    assert queue.take(10, on("node")).fragment is not None


def test_a_crashed_actor_is_awaited_only_when_others_have_nothing_to_do(
    queue_for: Callable[..., FragmentQueue],
):
    queue = queue_for(rows=128)
    first = queue.take(0, on("a")).fragment
    assert queue.awaited_actors() == set()
    assert queue.take(1, on("b")).fragment is not None
    assert queue.awaited_actors() == set()
    queue.finish(1)
    assert queue.take(2, on("b")).should_wait
    assert queue.awaited_actors() == {"actor on a"}
    assert queue.release("actor on a") == [first]
    assert queue.awaited_actors() == set()
    assert queue.take(2, on("b")).fragment == first
    assert queue.awaited_actors() == set(), "no ticket waits for what is in progress"
    # The actor has started again after all: its ticket holds nothing any more.
    assert queue.take(0, on("a")).should_wait


def test_crashes_on_a_fragment_are_bounded_and_the_loss_of_a_node_is_none(
    source_for: Callable[..., FragmentSource],
):
    progress = ProgressActor()
    progress.start(source_for(rows=64))
    fragment = progress.take_fragment(0, on("lost")).fragment
    assert progress.release_node("lost") == [fragment]
    assert progress.take_fragment(1, on("a")).fragment == fragment  # crashes
    assert progress.take_fragment(2, on("b")).should_wait
    progress.release_actor("actor on a")
    assert progress.take_fragment(2, on("b")).fragment == fragment  # crashes
    with pytest.raises(RepeatedCrashError, match="rows 0 to 63"):
        progress.take_fragment(2, on("b"))
    assert progress.suspect_fragments() == [fragment]
