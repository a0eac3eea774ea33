"""Finds copies among prepared pixels, whose fingerprints Ray tasks compute and store next to the pixels."""

import io
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from batchcls.cluster.placement import Placement
from batchcls.errors import InputError
from batchcls.runs.lease import Lease
from batchcls.storage.filesystem import Storage, explain
from batchcls.training.duplicates.duplicate_report import (
    DuplicateReport,
    LeakPolicy,
    SplitImages,
    kept_rows,
    report_duplicates,
)
from batchcls.training.duplicates.fingerprints import FINGERPRINT, Fingerprints, fingerprint_images
from batchcls.training.pixel_preparation import PreparedPixels
from batchcls.training.sampling import LabeledRows
from batchcls.training.train_config import TrainingSettings
from batchcls.training.train_inputs import TrainingInputs

_RETRIES = 3
_PENDING_TASKS_PER_CPU = 2


def report_pixel_duplicates(
    inputs: TrainingInputs,
    pixels: tuple[PreparedPixels, PreparedPixels],
    work_dir: str,
    leaks: LeakPolicy,
    placement: Placement,
    lease: Lease,
) -> DuplicateReport:
    """Find copies among the labeled images of both manifests; see `report_duplicates`.

    Args:
        inputs: inputs of the training run.
        pixels: prepared pixels of training and validation rows.
        work_dir: URI of the work directory.
        leaks: what the caller does with the training rows that are also in validation.
        placement: nodes that compute the fingerprints.
        lease: lease of the work directory; the search stops if it is lost.
    """
    height, width, _ = inputs.validation.load.preprocessing.shape
    splits = []
    for part, prepared in zip((inputs.training, inputs.validation), pixels, strict=True):
        rows = part.labeled_rows()
        rows = rows[prepared.has_image(rows)]
        # Of training images, the part that validation images show is compared.
        found = fingerprint_pixels(prepared, (height, width), inputs.storage, placement, lease.check)
        splits.append(SplitImages(part.manifest, rows, found[rows]))
    training, validation = splits
    return report_duplicates(training, validation, work_dir, leaks, inputs.storage)


def without_leaks(
    settings: TrainingSettings, duplicates: DuplicateReport, labels: tuple[str, ...]
) -> TrainingSettings:
    """Return the settings without the training rows that are also in validation, held out or not; see `kept_rows`.

    Raises:
        InputError: no training row or no held-out row is left.
    """
    training, held_out = settings.training, settings.held_out
    kept = kept_rows(training.rows, training.targets, duplicates.leaked, labels)
    if held_out is not None:
        is_held_out = ~np.isin(held_out.rows, duplicates.leaked)
        if not is_held_out.any():
            raise InputError("--leaks remove leaves no held-out image; raise --held-out-fraction, or omit it")
        held_out = LabeledRows(held_out.rows[is_held_out], held_out.targets[is_held_out])
    return replace(
        settings, training=LabeledRows(training.rows[kept], training.targets[kept]), held_out=held_out
    )


def fingerprint_pixels(
    pixels: PreparedPixels,
    size: tuple[int, int],
    storage: Storage,
    placement: Placement,
    check: Callable[[], object],
) -> Fingerprints:
    """Return the fingerprints of all N rows of a manifest; those of rows without an image are meaningless.

    Args:
        pixels: prepared pixels of the manifest.
        size: height and width of the center crop that is compared.
        storage: storage that holds the pixels.
        placement: nodes that compute the fingerprints.
        check: called between parts; an exception stops the computation.
    """
    task = ray.remote(num_cpus=1, max_retries=_RETRIES, label_selector=dict(placement.job))(fingerprint_part)
    max_pending = placement.cpus * _PENDING_TASKS_PER_CPU
    shared = ray.put(storage)
    pending: deque[Any] = deque()
    found: list[Fingerprints] = [np.empty(0, FINGERPRINT)]
    for uri in pixels.uris:
        pending.append(task.remote(uri, size, shared))
        if len(pending) >= max_pending:
            found.append(ray.get(pending.popleft()))
            check()
    return np.concatenate([*found, *ray.get(list(pending))])


def fingerprint_part(uri: str, size: tuple[int, int], storage: Storage) -> Fingerprints:
    """Return the fingerprints of a part, and write them next to it unless they exist.

    Args:
        uri: URI of the part without suffix.
        size: height and width of the center crop that is compared.
        storage: storage that holds the part.
    """
    stored = f"{uri}.fingerprints-{size[0]}x{size[1]}.npy"
    with explain(uri):
        if storage.exists(stored):
            earlier: Fingerprints = np.load(io.BytesIO(storage.read_bytes(stored)))
            if earlier.dtype == FINGERPRINT:
                return earlier
        images = np.load(io.BytesIO(storage.read_bytes(f"{uri}.npy")))
        found = fingerprint_images(images, size)
        buffer = io.BytesIO()
        np.save(buffer, found)
        storage.write_atomic(stored, buffer.getvalue())
    return found
