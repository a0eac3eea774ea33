"""The pictures of both manifests, prepared by Ray tasks on all nodes, and the budget for those that fail."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from batchcls.errors import BudgetExceeded
from batchcls.identity import BadIds
from batchcls.images.settings import LoadSettings
from batchcls.manifest import Manifest
from batchcls.schema import REASONS, Reason
from batchcls.storage import Storage, redact_uri
from batchcls.training.pixels import Part, PreparedPart, parts_folder, parts_of, prepare_part

_RETRIES = 3
_WAITING_TASKS_A_CPU = 2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedPixels:
    """Where the pictures of a manifest lie, and which are missing.

    Attributes:
        folder: with the parts.
        uris: of the parts, in the order of the rows, without suffix.
        failed: reason and detail by row number.
    """

    folder: str
    uris: tuple[str, ...]
    failed: Mapping[int, tuple[str, str]]

    def is_there(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For row numbers: whether there is a picture."""
        return ~np.isin(rows, np.fromiter(self.failed, np.int64, len(self.failed)))


def prepare_pixels(
    manifest: Manifest,
    bad_ids: BadIds,
    settings: LoadSettings,
    place: tuple[str, Storage],
    tell: Callable[[int], None],
) -> PreparedPixels:
    """Fetch, decode and write every picture that is not there yet.

    Args:
        manifest: whose pictures.
        bad_ids: its rows without an id of their own, which are left out.
        settings: how pictures are loaded.
        place: state folder and how to reach it.
        tell: called with the number of rows done so far.
    """
    state, storage = place
    # Labels are read elsewhere.
    columns = manifest.without_kept().columns
    folder = parts_folder(state, manifest, settings)
    parts = parts_of(manifest, folder)
    shared = ray.put((columns, storage, replace(settings, kept=())))
    done = 0
    failed: dict[int, tuple[str, str]] = {}
    for outcome in _run(parts, bad_ids, shared):
        done += outcome.rows
        failed |= outcome.failures
        tell(done)
    return PreparedPixels(folder, tuple(part.uri for part in parts), failed)


def _run(parts: Sequence[Part], bad_ids: BadIds, shared: Any) -> Iterator[PreparedPart]:
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_prepare)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) * _WAITING_TASKS_A_CPU
    waiting: list[Any] = []
    for part in parts:
        first = part.fragment.first_row
        waiting.append(task.remote(part, shared, bad_ids.between(first, first + part.fragment.rows)))
        if len(waiting) >= most:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield from ray.get(ready)


def _prepare(part: Part, shared: Any, rejected: Mapping[int, Any]) -> PreparedPart:
    columns, storage, settings = shared
    return prepare_part(part, columns, storage, settings, rejected)


def check_failures(which: str, pixels: PreparedPixels, rows: int, most: float) -> None:
    """Say how many pictures cannot be used, and why.

    Raises:
        BudgetExceeded: they are more than the share `most` of the rows.
    """
    if not pixels.failed:
        return
    counts = Counter(reason for reason, _ in pixels.failed.values())
    reasons = "; ".join(
        f"{reason}={count} ({REASONS[Reason(reason)].meaning})" for reason, count in counts.most_common()
    )
    share = len(pixels.failed) / rows
    first = ", ".join(f"row {row}" for row in sorted(pixels.failed)[:5])
    message = (
        f"{len(pixels.failed)} of {rows} {which} pictures cannot be used ({share:.2%}): {reasons}; {first}"
    )
    if share > most:
        raise BudgetExceeded(
            f"{message}; more than --max-failed-fraction {most:g} allows. The prepared pictures are in "
            f"{redact_uri(pixels.folder)}"
        )
    _logger.warning("%s; they are left out", message)
