"""The progress actor without Ray: what counts, and which fragments are suspected of crashing their process."""

from collections import Counter

from batchcls.manifest.row_ranges import RowRanges
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.progress import ProgressActor
from batchcls.runs.parts import PartFile, Receipt


def test_a_block_counts_once_and_a_stop_request_is_returned():
    actor = ProgressActor()
    assert actor.add_block(0, 10, Counter(truncated=1), 100.0)
    assert actor.add_block(0, 10, Counter(truncated=1), 300.0)
    actor.request_stop()
    assert not actor.add_block(10, 5, Counter(), 200.0)
    progress = actor.progress()
    assert (progress.rows, progress.failures, progress.peak_memory_mib) == (15, Counter(truncated=1), 300.0)


def test_fragments_that_were_started_most_often_are_suspects():
    actor = ProgressActor()
    assert actor.suspect_fragments() == []
    first, second, third = (Fragment("m.parquet", 0, row, 64, row) for row in (0, 64, 128))
    for fragment in (first, second, third):
        actor.start_fragment(fragment, "node")
    assert actor.suspect_fragments() == [first, second, third]
    actor.start_fragment(second, "node")
    assert actor.suspect_fragments() == [second]
    actor.finish_fragment(64)
    assert actor.suspect_fragments() == [first, third]


def test_a_restart_counts_from_the_receipts():
    actor = ProgressActor()
    actor.start_fragment(Fragment("m.parquet", 0, 0, 64, 0), "node")
    actor.add_block(0, 10, Counter(), 1.0)
    part = {"path": "a.parquet", "bytes": 1, "digest": "d"}
    files = (
        PartFile(**part, kind="predictions", rows=20, ranges=RowRanges.all(20)),
        PartFile(**part, kind="quarantine", rows=2, ranges=RowRanges.all(2), failures=Counter(truncated=2)),
    )
    actor.restart([Receipt(name="a.json", files=files, seconds={}, image_bytes=0, written_at=0.0)])
    assert actor.suspect_fragments() == []
    progress = actor.progress()
    assert (progress.rows, progress.failures) == (22, Counter(truncated=2))
    actor.add_block(0, 10, Counter(), 1.0)
    assert actor.progress().rows == 32
