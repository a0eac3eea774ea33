"""Isolation of the images that crash the process which decodes them.

When the worker processes of a fragment crash repeatedly, its rows are decoded individually in a separate process,
on any node. Rows that crash this process as well are quarantined as decoder_crash, and the fragment is
processed again without them.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray

from batchcls.errors import BatchclsError
from batchcls.images.isolated_decode import ImageRow, find_crashing_rows
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Fragment
from batchcls.pipeline.pipeline_spec import MAX_RETRIES, LoadSpec, PipelineSpec
from batchcls.pipeline.ray_data.fragment_queue import rejected_rows
from batchcls.pipeline.ray_errors import root_cause
from batchcls.schema import IMAGE, ROW, URI, Failure

_ROWS_PER_TABLE = 256

_logger = logging.getLogger(__name__)


class UnexplainedCrashError(BatchclsError):
    """Worker processes crashed, and no image explains it."""


def isolate_fragments(
    spec: PipelineSpec,
    fragments: Iterable[Fragment],
    known: Mapping[int, Failure],
    on_wait: Callable[[], None],
) -> dict[int, Failure]:
    """Decode the rows of several fragments in isolation and wait for the result, calling `on_wait` meanwhile.

    A process works on two fragments, so a crash hits a harmless fragment together with the one that caused it. If none
    of them has a crashing row, the cause is not an image.

    Args:
        spec: of the pipeline.
        fragments: on which processes crashed.
        known: rows that were found before; the process crashed without them, so they do not explain it.
        on_wait: called about once a second; what it raises ends the isolation.

    Returns:
        The other rows that crash their process, by row number.

    Raises:
        UnexplainedCrashError: no image explains the crashes.
        BatchclsError: an isolation task failed.
    """
    load = ray.put(spec.worker.load)
    # The task reserves no CPU, because the actors hold all of them; the CPU of the crashed process is idle.
    task = ray.remote(num_cpus=0, max_retries=MAX_RETRIES, label_selector=dict(spec.placement.cpu))(
        _isolate_fragment
    )
    calls: dict[Any, Fragment] = {}
    for fragment in fragments:
        _logger.warning(
            "worker processes crashed on rows %d to %d; decoding them individually in isolation",
            fragment.first_row,
            fragment.stop - 1,
        )
        calls[task.remote([load], fragment, rejected_rows(spec.invalid_ids, known, fragment))] = fragment
    crashing_rows: dict[int, Failure] = {}
    pending = list(calls)
    while pending:
        finished, pending = ray.wait(pending, timeout=1.0)
        on_wait()
        for call in finished:
            try:
                found: dict[int, Failure] = ray.get(call)
            except ray.exceptions.RayError as error:
                raise BatchclsError(f"the pipeline failed: {root_cause(error)}") from error
            for row, failure in found.items():
                _logger.warning("row %d: %s; quarantined as %s", row, failure.detail, failure.reason)
            crashing_rows |= found
    if not crashing_rows:
        raise _unexplained_crashes(calls.values())
    return crashing_rows


def _unexplained_crashes(fragments: Iterable[Fragment]) -> UnexplainedCrashError:
    """Return the error of a job whose worker processes crash although no image crashes the isolated process."""
    fragments = list(fragments)
    first = min(fragment.first_row for fragment in fragments)
    last = max(fragment.stop for fragment in fragments) - 1
    return UnexplainedCrashError(
        f"the pipeline failed: worker processes crashed repeatedly on rows {first} to {last}, but none of the "
        "images crashes a process on its own; the node may be out of memory, or another program kills the processes"
    )


def _isolate_fragment(
    load: "list[ray.ObjectRef[LoadSpec]]", fragment: Fragment, rejected: Mapping[int, Failure]
) -> dict[int, Failure]:
    spec: LoadSpec = ray.get(load[0])
    reader = FragmentReader(spec.columns, spec.storage)
    rows = [
        ImageRow(row, uri, image)
        for table in reader.read(fragment, _ROWS_PER_TABLE)
        for row, uri, image in zip(
            *(table.column(name).to_pylist() for name in (ROW, URI, IMAGE)), strict=True
        )
        if row not in rejected
    ]
    return find_crashing_rows(spec.settings, rows)
