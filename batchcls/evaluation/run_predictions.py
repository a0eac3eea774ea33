"""Reads the predictions of a committed run for a labeled manifest, joined by item_id; only top_k is stored."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchcls.errors import InputError
from batchcls.evaluation.classification_metrics import NOT_RANKED, Categories, Outcomes, Rows
from batchcls.evaluation.labeled_rows import NOT_IN_RUN, LabeledManifest, with_failures
from batchcls.evaluation.model_predictions import nothing_judged
from batchcls.runs.paths import CURRENT, PREDICTIONS, RUN
from batchcls.schema import ITEM_ID
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

_ROWS_PER_PART = 65_536
_COLUMNS = [ITEM_ID, "label", "probability", "top_k"]


@dataclass(frozen=True, slots=True)
class Run:
    """A committed run: its folder and its record."""

    folder: str
    record: dict[str, Any]


def open_run(uri: str, storage: Storage) -> Run:
    """A run's own folder, or the published one of an output folder.

    Raises:
        InputError: there is no committed run.
    """
    folder = uri.rstrip("/")
    with explain(folder):
        if not storage.exists(join(folder, RUN)):
            if not storage.exists(join(folder, CURRENT)):
                raise InputError(
                    f"--run {redact_uri(folder)}: there is neither {RUN} nor {CURRENT}; name a committed run "
                    "(OUTPUT/runs/ID) or an output folder with a published one"
                )
            folder = join(folder, json.loads(storage.read_bytes(join(folder, CURRENT)))["path"])
        return Run(folder, json.loads(storage.read_bytes(join(folder, RUN))))


def read_answers(
    run: Run, labeled: LabeledManifest, storage: Storage
) -> tuple[pa.Table, Rows, Outcomes, int]:
    """What the run said about the rows of a labeled manifest.

    The categories are the labels that occur, in the manifest or in the run: a run does not list those of its
    model.

    Returns:
        `labeled.NOTES` of all rows; the numbers of the judged ones; their outcomes; how many categories
        the run ranked.

    Raises:
        InputError: not one row can be judged.
    """
    parts = list(labeled.without_images().parts(None, _ROWS_PER_PART))
    notes = pa.concat_tables(part.notes for part in parts).combine_chunks()
    rows = np.concatenate([part.rows.column("row").to_numpy() for part in parts])
    answers = _read(run, storage)
    wanted = notes.take(rows)
    places = pc.index_in(wanted.column(ITEM_ID), value_set=answers.column(ITEM_ID))
    found = places.is_valid().to_numpy()
    notes = with_failures(notes, dict.fromkeys(rows[~found].tolist(), NOT_IN_RUN))
    if not found.any():
        raise InputError(nothing_judged(notes))
    answered = answers.take(places.drop_null())
    outcomes, kept = _outcomes(wanted.column("label").filter(pa.array(found)), answered)
    return notes, rows[found], outcomes, kept


def _read(run: Run, storage: Storage) -> pa.Table:
    tables = []
    for file in run.record["files"]:
        if file["kind"] == PREDICTIONS:
            uri = join(run.folder, file["path"])
            with explain(uri):
                filesystem, path = storage.arrow_filesystem(uri)
                with filesystem.open_input_file(path) as opened:
                    tables.append(pq.read_table(opened, columns=_COLUMNS))
    if not tables:
        raise InputError(f"--run {redact_uri(run.folder)}: it has no predictions")
    return pa.concat_tables(tables).combine_chunks()


def _outcomes(truth: pa.ChunkedArray, answered: pa.Table) -> tuple[Outcomes, int]:
    top = answered.column("top_k").combine_chunks()
    ranked = top.flatten()
    names, probabilities = ranked.field("label"), ranked.field("probability").to_numpy()
    parent = pc.list_parent_indices(top).to_numpy()
    lengths = pc.list_value_length(top).to_numpy()
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # The best of top_k, since under --abstain the column label may be null.
    best = names.take(pa.array(starts))
    labels = pc.unique(pa.chunked_array([*truth.chunks, names])).sort()
    right = pc.equal(names, truth.combine_chunks().take(pa.array(parent))).to_numpy(zero_copy_only=False)
    rank = np.full(len(lengths), NOT_RANKED, np.int32)
    rank[parent[right]] = (np.arange(len(parent)) - starts[parent])[right]
    outcomes = Outcomes(
        tuple(labels.to_pylist()), _places(truth, labels), _places(best, labels), probabilities[starts], rank
    )
    return outcomes, int(lengths.min())


def _places(values: pa.Array | pa.ChunkedArray, labels: pa.Array) -> Categories:
    places: Categories = pc.index_in(values, value_set=labels).to_numpy().astype(np.int32)
    return places
