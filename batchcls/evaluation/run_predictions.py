"""Reads the predictions of a committed run for the rows of a labeled manifest, joined by item_id.

A run stores the top-k predictions but no logits.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.evaluation.classification_metrics import NOT_RANKED, Categories, Outcomes, Rows
from batchcls.evaluation.labeled_rows import NOT_IN_RUN, LabeledManifest, with_failures
from batchcls.evaluation.model_predictions import no_rows_message
from batchcls.runs.catalog import parse_current, parse_document
from batchcls.runs.paths import CURRENT, RUN
from batchcls.runs.records import RunRecord
from batchcls.schema import ITEM_ID
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

_ROWS_PER_PART = 65_536
_COLUMNS = [ITEM_ID, "label", "probability", "top_k"]


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """A committed run: its folder and the contents of its run.json."""

    folder: str
    record: RunRecord


def open_evaluated_run(uri: str, storage: Storage) -> EvaluatedRun:
    """Open the run in the folder `uri`, or the published run if `uri` is an output folder.

    Raises:
        InputError: There is no committed run.
    """
    folder = uri.rstrip("/")
    with explain(folder):
        if not storage.exists(join(folder, RUN)):
            if not storage.exists(join(folder, CURRENT)):
                raise InputError(
                    f"--run {redact_uri(folder)}: contains neither {RUN} nor {CURRENT}; specify a committed run "
                    "(OUTPUT/runs/ID) or an output folder with a published run"
                )
            folder = join(folder, parse_current(folder, storage.read_bytes(join(folder, CURRENT))).path)
        uri = join(folder, RUN)
        return EvaluatedRun(folder, parse_document(uri, storage.read_bytes(uri), RunRecord))


def read_run_predictions(
    run: EvaluatedRun, labeled: LabeledManifest, storage: Storage
) -> tuple[pa.Table, Rows, Outcomes, int]:
    """Read the predictions of the run for the rows of a labeled manifest.

    The categories are the labels that occur in the manifest or in the run, because a run does not list the
    classes of its model.

    Returns:
        The table of all rows with the schema `labeled_rows.NOTES`, the row numbers of the evaluated rows, their
        outcomes, and the number of categories that the run ranked.

    Raises:
        InputError: No row can be evaluated.
    """
    parts = list(labeled.without_images().parts(None, _ROWS_PER_PART))
    notes = pa.concat_tables(part.notes for part in parts).combine_chunks()
    rows = np.concatenate([part.rows.column("row").to_numpy() for part in parts])
    predictions = _read_predictions(run, storage)
    labeled_notes = notes.take(rows)
    positions = pc.index_in(labeled_notes.column(ITEM_ID), value_set=predictions.column(ITEM_ID))
    in_run = positions.is_valid().to_numpy()
    notes = with_failures(notes, dict.fromkeys(rows[~in_run].tolist(), NOT_IN_RUN))
    if not in_run.any():
        if len(rows):
            raise InputError(_no_common_ids_message(run, labeled_notes, predictions))
        raise InputError(no_rows_message(notes))
    truth = labeled_notes.column("label").filter(pa.array(in_run))
    outcomes, ranked_categories = _outcomes(truth, predictions.take(positions.drop_null()))
    return notes, rows[in_run], outcomes, ranked_categories


def _no_common_ids_message(run: EvaluatedRun, labeled_notes: pa.Table, predictions: pa.Table) -> str:
    """Error message for labeled rows of which the run has predicted none."""
    folder, ids = redact_uri(run.folder), predictions.column(ITEM_ID)
    if len(ids) == 0:
        return f"--run {folder}: the run has no predictions"
    return (
        f"--run {folder}: no item_id of the {labeled_notes.num_rows} labeled rows of the manifest occurs in the "
        f"predictions of the run: the manifest has IDs such as {labeled_notes.column(ITEM_ID)[0].as_py()!r}, the run "
        f"such as {ids[0].as_py()!r}; specify the run of this manifest, or the column with the IDs of the run with "
        "--id-column"
    )


def _read_predictions(run: EvaluatedRun, storage: Storage) -> pa.Table:
    tables = []
    for file in run.record.files:
        if file.kind == "predictions":
            uri = join(run.folder, file.path)
            with explain(uri):
                filesystem, path = storage.arrow_filesystem(uri)
                with filesystem.open_input_file(path) as opened:
                    tables.append(pq.read_table(opened, columns=_COLUMNS))
    if not tables:
        raise InputError(f"--run {redact_uri(run.folder)}: the run has no predictions")
    return pa.concat_tables(tables).combine_chunks()


def _outcomes(truth: pa.ChunkedArray, predictions: pa.Table) -> tuple[Outcomes, int]:
    """Outcomes of the rows, and the smallest number of categories that a row ranks."""
    top_k = predictions.column("top_k").combine_chunks()
    entries = top_k.flatten()
    names, probabilities = entries.field("label"), entries.field("probability").to_numpy()
    parent = pc.list_parent_indices(top_k).to_numpy()
    lengths = pc.list_value_length(top_k).to_numpy()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # The first entry of top_k, because the column label may be null with --abstain.
    predicted = names.take(pa.array(starts))
    labels = pc.unique(pa.chunked_array([*truth.chunks, names])).sort()
    is_true = pc.equal(names, truth.combine_chunks().take(pa.array(parent))).to_numpy(zero_copy_only=False)
    rank = np.full(len(lengths), NOT_RANKED, np.int32)
    rank[parent[is_true]] = (np.arange(len(parent)) - starts[parent])[is_true]
    outcomes = Outcomes(
        labels=tuple(labels.to_pylist()),
        truth=_label_indices(truth, labels),
        predicted=_label_indices(predicted, labels),
        probability=probabilities[starts],
        rank=rank,
    )
    return outcomes, int(lengths.min())


def _label_indices(values: pa.Array | pa.ChunkedArray, labels: pa.Array) -> Categories:
    indices: Categories = pc.index_in(values, value_set=labels).to_numpy().astype(np.int32)
    return indices
