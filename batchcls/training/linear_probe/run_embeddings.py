"""Reads a sample of the embeddings that a committed run has stored, with the classes that were predicted from them."""

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from batchcls.errors import InputError
from batchcls.evaluation.run_predictions import EvaluatedRun, open_evaluated_run
from batchcls.runs.catalog import one_line
from batchcls.runs.records import RunFile
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.training.linear_probe.labeled_embeddings import LinearHead

_EMBEDDING = "embedding"
_COLUMNS = [_EMBEDDING, "top_k", "content_hash"]
_MAX_ROW_GROUPS = 64
# Engines of lower precision change the class of up to 2 % of the images.
_MIN_AGREEMENT = 0.95

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunEmbeddings:
    """A sample of n rows of a run.

    Attributes:
        run_id: name of the run.
        values: embeddings, float32 of shape (n, D).
        hashes: SHA-256 of the contents of the images, n strings.
    """

    run_id: str
    values: npt.NDArray[np.float32]
    hashes: tuple[str | None, ...]


def read_run_embeddings(uri: str, head: LinearHead, max_rows: int, storage: Storage) -> RunEmbeddings:
    """Read embeddings of evenly spaced rows of a run, and verify that the network of a bundle computed them.

    Args:
        uri: folder of a committed run, or an output folder with a published run.
        head: classifier of the bundle on its pooled embedding; the bundle may have other labels than the run.
        max_rows: maximum number of rows, which are read from at most 64 row groups.
        storage: storage that holds the run.

    Raises:
        InputError: there is no such run, it has no embeddings that the classifier can read, or another network
            computed them.
    """
    run = open_evaluated_run(uri, storage)
    _require_pooled(run)
    tables = [
        _read(run, file, groups, storage) for file, groups in _choose_row_groups(run, storage) if len(groups)
    ]
    rows = pa.concat_tables(tables).combine_chunks()
    rows = rows.take(
        pa.array(np.linspace(0, rows.num_rows - 1, min(max_rows, rows.num_rows)).astype(np.int64))
    )
    embeddings = rows.column(_EMBEDDING).combine_chunks()
    values = embeddings.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = values.reshape(len(embeddings), -1)
    _require_same_network(run, head, values, rows.column("top_k").combine_chunks())
    _logger.info("run %s: %d stored embeddings of %d predictions", run.record.run_id, len(values), _rows(run))
    return RunEmbeddings(run.record.run_id, values, tuple(rows.column("content_hash").to_pylist()))


def _rows(run: EvaluatedRun) -> int:
    return sum(file.rows for file in run.record.files if file.kind == "predictions")


def _require_pooled(run: EvaluatedRun) -> None:
    name, settings, tap = redact_uri(run.folder), run.record.result_settings, run.record.model.embedding_tap
    problem = None
    if _rows(run) == 0:
        problem = "has no predictions"
    elif settings.get("embedding_dtype") == "none":
        problem = "has stored no embeddings (--embedding-dtype none)"
    elif settings.get("l2_normalize"):
        problem = "has scaled its embeddings to length 1 (--l2-normalize), which the classifier cannot read"
    elif tap not in (None, "pooled"):
        problem = f"has stored the embedding {tap}, which the classifier cannot read; it needs the pooled one"
    if problem is not None:
        raise InputError(
            f"--run {name} {problem}; specify another run, or give images of the existing categories with --manifest"
        )


def _choose_row_groups(run: EvaluatedRun, storage: Storage) -> list[tuple[RunFile, list[int]]]:
    """Choose at most 64 evenly spaced row groups; a file with many rows is read in part."""
    files = [file for file in run.record.files if file.kind == "predictions" and file.rows]
    chosen = [
        files[index] for index in np.unique(np.linspace(0, len(files) - 1, _MAX_ROW_GROUPS).astype(int))
    ]
    share = max(1, _MAX_ROW_GROUPS // len(chosen))
    found = []
    for file in chosen:
        uri = join(run.folder, file.path)
        with explain(uri):
            filesystem, path = storage.arrow_filesystem(uri)
            with filesystem.open_input_file(path) as opened:
                groups = pq.read_metadata(opened).num_row_groups
        found.append((file, np.unique(np.linspace(0, groups - 1, share).astype(int)).tolist()))
    return found


def _read(run: EvaluatedRun, file: RunFile, groups: list[int], storage: Storage) -> pa.Table:
    uri = join(run.folder, file.path)
    try:
        with explain(uri):
            filesystem, path = storage.arrow_filesystem(uri)
            with filesystem.open_input_file(path) as opened:
                return pq.ParquetFile(opened).read_row_groups(groups, columns=_COLUMNS)
    except pa.ArrowException as error:
        raise InputError(
            f"--run {redact_uri(uri)} is damaged ({one_line(error)}); see `batchcls runs verify`"
        ) from None


def _best_classes(run: EvaluatedRun, logits: torch.Tensor) -> npt.NDArray[np.intp]:
    """The indices that the run would store for these logits: of classes after its label map."""
    layers, groups = run.record.model.layers, run.record.model.groups
    probabilities: npt.NDArray[np.float32] = logits.numpy()
    if groups is not None and groups.classes == logits.shape[1]:
        temperature = 1.0 if layers is None else layers.temperature
        probabilities = groups.sum((logits / temperature).softmax(1).numpy())
    best: npt.NDArray[np.intp] = probabilities.argmax(axis=1)
    return best


def _require_same_network(
    run: EvaluatedRun, head: LinearHead, values: npt.NDArray[np.float32], top_k: pa.Array
) -> None:
    """Compare the classes that the head predicts from the embeddings with those that the run has stored."""
    name, dimension = redact_uri(run.folder), head.weight.shape[1]
    agreement = 0.0
    if values.shape[1] == dimension:
        stored = pc.list_element(top_k, 0).field("class_index").to_numpy(zero_copy_only=False)
        agreement = float((_best_classes(run, head.logits(torch.from_numpy(values))) == stored).mean())
    if agreement < _MIN_AGREEMENT:
        raise InputError(
            f"--run {name}: the classifier of the bundle reproduces {agreement:.0%} of the run's predictions from its "
            "embeddings, so another model computed them; specify a run of this bundle"
        )
