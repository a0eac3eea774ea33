"""Prepares the pixel caches of a training: Ray tasks fetch and decode the images of both manifests."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from rich.console import Console

from batchcls.cli.console import show_progress
from batchcls.cluster.placement import Placement
from batchcls.config.common_config import Auto
from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import BudgetExceeded
from batchcls.runs.commit import allowed_fraction
from batchcls.runs.lease import Lease
from batchcls.schema import REASONS, Reason
from batchcls.storage.filesystem import redact_uri
from batchcls.training.pixel_cache import PixelPart, PreparedPart, pixel_folder, pixel_parts, prepare_part
from batchcls.training.train_inputs import TrainingInputs, TrainingManifest
from batchcls.training.training_progress import TrainingProgress

_RETRIES = 3
_PENDING_TASKS_PER_CPU = 2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedPixels:
    """Location of the prepared images of a manifest, and the rows that failed.

    Attributes:
        folder: folder of the parts.
        uris: URIs of the parts in row order, without suffix.
        failed: reason and detail of failed rows, by row number.
    """

    folder: str
    uris: tuple[str, ...]
    failed: Mapping[int, tuple[str, str]]

    def has_image(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return a boolean array that is true for the row numbers that have an image."""
        return ~np.isin(rows, np.fromiter(self.failed, np.int64, len(self.failed)))


def prepare_pixels(
    config: FinetuneConfig, inputs: TrainingInputs, placement: Placement, lease: Lease, console: Console
) -> tuple[PreparedPixels, PreparedPixels]:
    """Fetch, decode and write all training and validation images that are not prepared yet.

    Args:
        config: settings of the command.
        inputs: inputs of the training run.
        placement: nodes that prepare the images.
        lease: lease of the work directory; the preparation stops if it is lost.
        console: console that shows the progress.

    Returns:
        The prepared pixels of the training and of the validation manifest.

    Raises:
        BudgetExceeded: more images failed than `--max-failed-fraction` allows.
    """
    progress = TrainingProgress()

    def prepared(part: TrainingManifest, before: int) -> PreparedPixels:
        def on_progress(done: int) -> None:
            lease.check()
            progress.rows = before + done

        return _prepare_manifest(part, config.work_folder, inputs, placement, on_progress)

    rows = inputs.training.manifest.rows + inputs.validation.manifest.rows
    with show_progress(lambda: progress, rows, console, config.log_interval_seconds, "prepare"):
        training = prepared(inputs.training, 0)
        validation = prepared(inputs.validation, inputs.training.manifest.rows)
    for which, pixels, part in (
        ("training", training, inputs.training),
        ("validation", validation, inputs.validation),
    ):
        _check_failures(which, pixels, part.manifest.rows, config.max_failed_fraction)
    return training, validation


def _prepare_manifest(
    part: TrainingManifest,
    work_dir: str,
    inputs: TrainingInputs,
    placement: Placement,
    on_progress: Callable[[int], None],
) -> PreparedPixels:
    """Prepare the images of a manifest; `on_progress` is called with the number of rows prepared so far."""
    # Labels were read before.
    columns = part.manifest.without_kept().columns
    folder = pixel_folder(work_dir, part.manifest, part.load)
    parts = pixel_parts(part.manifest, folder)
    shared = ray.put((columns, inputs.storage, replace(part.load, kept=())))
    # Rows with a null or duplicate ID are excluded.
    tasks = (
        (
            piece,
            part.invalid_ids.between(
                piece.fragment.first_row, piece.fragment.first_row + piece.fragment.rows
            ),
        )
        for piece in parts
    )
    rows_done = 0
    failed: dict[int, tuple[str, str]] = {}
    for outcome in _run_tasks(tasks, shared, placement):
        rows_done += outcome.rows
        failed |= outcome.failures
        on_progress(rows_done)
    return PreparedPixels(folder, tuple(piece.uri for piece in parts), failed)


def _run_tasks(
    tasks: Iterator[tuple[PixelPart, Mapping[int, Any]]], shared: Any, placement: Placement
) -> Iterator[PreparedPart]:
    task = ray.remote(num_cpus=1, max_retries=_RETRIES, label_selector=dict(placement.job))(
        _prepare_part_task
    )
    max_pending = placement.cpus * _PENDING_TASKS_PER_CPU
    pending: list[Any] = []
    for piece, rejected in tasks:
        pending.append(task.remote(piece, shared, rejected))
        if len(pending) >= max_pending:
            ready, pending = ray.wait(pending)
            yield from ray.get(ready)
    while pending:
        ready, pending = ray.wait(pending)
        yield from ray.get(ready)


def _prepare_part_task(part: PixelPart, shared: Any, rejected: Mapping[int, Any]) -> PreparedPart:
    columns, storage, settings = shared
    return prepare_part(part, columns, storage, settings, rejected)


def _check_failures(name: str, pixels: PreparedPixels, rows: int, max_failed_fraction: float | Auto) -> None:
    """Log the number of images that cannot be used, with reasons.

    Raises:
        BudgetExceeded: the fraction of failed images is larger than the setting allows.
    """
    if not pixels.failed:
        return
    counts = Counter(reason for reason, _ in pixels.failed.values())
    reasons = "; ".join(
        f"{reason}={count} ({REASONS[Reason(reason)].meaning})" for reason, count in counts.most_common()
    )
    share, max_fraction = len(pixels.failed) / rows, allowed_fraction(max_failed_fraction, rows)
    first = ", ".join(f"row {row}" for row in sorted(pixels.failed)[:5])
    message = f"{len(pixels.failed)} of {rows} {name} images cannot be used ({share:.2%}): {reasons}; {first}"
    if share > max_fraction:
        raise BudgetExceeded(
            f"{message}; more than --max-failed-fraction {max_fraction:g} allows. The prepared images are in "
            f"{redact_uri(pixels.folder)}"
        )
    _logger.warning("%s; they are excluded", message)
