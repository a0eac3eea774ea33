"""Reports copies of images as a table and in one line, and leaves out training rows that are also in validation."""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.manifest.ids import values_of_rows
from batchcls.manifest.snapshot import Manifest
from batchcls.storage.filesystem import Storage, join, redact_uri
from batchcls.storage.store_errors import resumable_errors
from batchcls.training.duplicates.copy_search import CopyPairs, find_copies
from batchcls.training.duplicates.fingerprints import Fingerprints

DUPLICATES_FILE = "duplicates.parquet"

LeakPolicy = Literal["report", "remove"]

_SPLITS = ("validation", "training")

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("item_id", pa.string()),
        pa.field("label", pa.string()),
        pa.field("other_split", pa.string(), nullable=False),
        pa.field("other_row", pa.int64(), nullable=False),
        pa.field("other_item_id", pa.string()),
        pa.field("other_label", pa.string()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("mirrored", pa.bool_(), nullable=False),
        pa.field("same_label", pa.bool_(), nullable=False),
    ]
)
"""Columns of duplicates.parquet, one row per pair of copies; `docs/how-to/fine-tune.md` describes them."""

_LISTED_ITEMS = 5

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SplitImages:
    """The labeled images of a manifest that can be read.

    Attributes:
        manifest: the manifest; its only kept column contains the labels.
        rows: row numbers of the n images, in ascending order.
        fingerprints: their fingerprints, of shape (n,).
    """

    manifest: Manifest
    rows: npt.NDArray[np.int64]
    fingerprints: Fingerprints


@dataclass(frozen=True, slots=True)
class DuplicateReport:
    """Copies within and between training and validation.

    Attributes:
        table: pairs of copies with `DUPLICATES_SCHEMA`: those between training and validation first, then those with
            different labels.
        leaked: numbers of the training rows that are an exact or near copy of a validation row, in ascending order.
        counts: numbers of leaked rows and of pairs, by name; part of the lineage of the bundle.
    """

    table: pa.Table
    leaked: npt.NDArray[np.int64]
    counts: dict[str, int]

    def describe(self) -> str:
        """Return a human-readable line with the counts and the first items."""
        counts, pairs = self.counts, self.table.num_rows
        if not pairs:
            return "duplicates: none within or between training and validation"
        parts = []
        if counts["leaked_rows"]:
            leaks = self.table.filter(_is_leak(self.table))
            ids = pc.unique(leaks["other_item_id"])
            parts.append(
                f"{counts['leaked_rows']} training images are also in validation ({counts['leaked_exact_rows']} exact, "
                f"{counts['leaked_near_rows']} near copies): {_listed(ids.to_pylist())}"
            )
        parts.append(
            f"{counts['training_pairs']} pairs within training and {counts['validation_pairs']} within validation"
        )
        if counts["pairs_with_two_labels"]:
            conflicts = self.table.filter(pc.invert(self.table["same_label"])).select(
                ["item_id", "label", "other_item_id", "other_label"]
            )
            texts = [
                f"{row['item_id']} ({row['label']}) and {row['other_item_id']} ({row['other_label']})"
                for row in conflicts.slice(0, _LISTED_ITEMS).to_pylist()
            ]
            parts.append(
                f"{counts['pairs_with_two_labels']} pairs have different labels: "
                f"{_listed(texts, conflicts.num_rows)}"
            )
        return "duplicates: " + "; ".join(parts)

    def write(self, work_dir: str, storage: Storage) -> str:
        """Write the table to the work directory, and return its URI."""
        uri, sink = join(work_dir, DUPLICATES_FILE), pa.BufferOutputStream()
        pq.write_table(self.table, sink)
        with resumable_errors(work_dir):
            storage.write_atomic(uri, sink.getvalue().to_pybytes())
        return uri


def report_duplicates(
    training: SplitImages, validation: SplitImages, work_dir: str, leaks: LeakPolicy, storage: Storage
) -> DuplicateReport:
    """Find copies, write them to the work directory and log them.

    Args:
        training: labeled training images.
        validation: labeled validation images.
        work_dir: URI of the folder of duplicates.parquet.
        leaks: what the caller does with the training rows that are also in validation; part of the log line.
        storage: storage that holds the manifests and the folder.
    """
    report = find_duplicates(training, validation, storage)
    uri = redact_uri(report.write(work_dir, storage))
    consequence = ""
    if len(report.leaked):
        consequence = (
            "; these training images are left out"
            if leaks == "remove"
            else "; accuracy on validation is too high by their share, --leaks remove leaves them out"
        )
    level = logging.WARNING if report.table.num_rows else logging.INFO
    _logger.log(level, "%s%s; details: %s", report.describe(), consequence, uri)
    return report


def find_duplicates(training: SplitImages, validation: SplitImages, storage: Storage) -> DuplicateReport:
    """Find the copies within and between training and validation.

    Raises:
        InputError: a manifest cannot be read.
    """
    # Validation rows come first, so that a validation row is the original of all its exact copies.
    pairs = find_copies(np.concatenate([validation.fingerprints, training.fingerprints]))
    first_training = len(validation.rows)
    is_exact, is_near = _leaked(pairs, first_training)
    leaked = training.rows[is_exact | is_near]
    table = _table(pairs, training, validation, storage)
    is_leak, splits = _is_leak(table), table["split"]
    counts = {
        "leaked_rows": len(leaked),
        "leaked_exact_rows": int(is_exact.sum()),
        "leaked_near_rows": int((is_near & ~is_exact).sum()),
        "training_pairs": pc.sum(pc.equal(splits, "training")).as_py() or 0,
        "validation_pairs": (pc.sum(pc.equal(splits, "validation")).as_py() or 0)
        - (pc.sum(is_leak).as_py() or 0),
        "pairs_with_two_labels": pc.sum(pc.invert(table["same_label"])).as_py() or 0,
    }
    return DuplicateReport(table, leaked, counts)


def kept_rows(
    rows: npt.NDArray[np.int64],
    classes: npt.NDArray[np.int32],
    leaked: npt.NDArray[np.int64],
    labels: tuple[str, ...],
) -> npt.NDArray[np.bool_]:
    """Return a boolean array that is false for leaked rows, and warn about categories that lose all their rows.

    Args:
        rows: numbers of n training rows.
        classes: their class indices, of shape (n,).
        leaked: row numbers to leave out.
        labels: names of the K classes.

    Raises:
        InputError: no training row is left.
    """
    kept: npt.NDArray[np.bool_] = ~np.isin(rows, leaked)
    if not kept.any():
        raise InputError(
            f"--leaks remove: all {len(rows)} training images are also in validation; check whether --manifest and "
            "--validation name the same images"
        )
    lost = np.setdiff1d(classes, classes[kept])
    if len(lost):
        _logger.warning(
            "--leaks remove leaves %d categories without training images: %s",
            len(lost),
            _listed([labels[index] for index in lost[lost >= 0]]),
        )
    return kept


def _leaked(pairs: CopyPairs, first_training: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return for each training image whether it is an exact copy, and whether it is a near copy of a validation image.

    Args:
        pairs: copies among all images, validation images first.
        first_training: index of the first training image.
    """
    is_near = np.zeros(len(pairs.original), np.bool_)
    near_leaks = ~pairs.exact & (pairs.first < first_training)
    is_near[pairs.second[near_leaks]] = True
    originals = pairs.original[first_training:]
    return originals < first_training, is_near[originals]


def _table(pairs: CopyPairs, training: SplitImages, validation: SplitImages, storage: Storage) -> pa.Table:
    columns: dict[str, pa.Array] = {}
    for prefix, indices in (("", pairs.first), ("other_", pairs.second)):
        is_training = indices >= len(validation.rows)
        columns[f"{prefix}split"] = pa.array(np.array(_SPLITS, object)[is_training.astype(int)], pa.string())
        columns |= _described(prefix, indices, training, validation, storage)
    columns["kind"] = pa.array(np.where(pairs.exact, "exact", "near"), pa.string())
    columns["similarity"] = pa.array(pairs.similarity, pa.float32())
    columns["mirrored"] = pa.array(pairs.mirrored, pa.bool_())
    columns["same_label"] = pc.equal(columns["label"], columns["other_label"])
    table = pa.table({name: columns[name] for name in DUPLICATES_SCHEMA.names}, schema=DUPLICATES_SCHEMA)
    order = np.lexsort(
        (
            pairs.second,
            -pairs.similarity,
            columns["same_label"].to_numpy(zero_copy_only=False),
            ~_is_leak(table).to_numpy(zero_copy_only=False),
        )
    )
    return table.take(pa.array(order))


def _described(
    prefix: str,
    indices: npt.NDArray[np.int64],
    training: SplitImages,
    validation: SplitImages,
    storage: Storage,
) -> dict[str, pa.Array]:
    """Return row number, ID and label of images, which are numbered from the first validation image."""
    rows = np.concatenate([validation.rows, training.rows])[indices]
    is_training = indices >= len(validation.rows)
    found: dict[str, pa.Array] = {f"{prefix}row": pa.array(rows, pa.int64())}
    for name in ("item_id", "label"):
        values = np.empty(len(rows), object)
        for split, chosen in ((validation, ~is_training), (training, is_training)):
            columns = split.manifest.columns
            column = columns.item_id if name == "item_id" else columns.kept[0].name
            values[chosen] = values_of_rows(split.manifest, column, rows[chosen], storage).to_pylist()
        found[f"{prefix}{name}"] = pa.array(values, pa.string())
    return found


def _is_leak(table: pa.Table) -> pa.ChunkedArray:
    """Return a boolean array: a validation row comes first in each pair with a training row."""
    return pc.not_equal(table["split"], table["other_split"])


def _listed(texts: list[str], count: int | None = None) -> str:
    total = len(texts) if count is None else count
    more = f" and {total - _LISTED_ITEMS} more" if total > _LISTED_ITEMS else ""
    return f"{', '.join(map(str, texts[:_LISTED_ITEMS]))}{more}"
