"""Writes the outputs of an evaluation: metrics.json, four Parquet tables and the HTML page."""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from batchcls.errors import InputError
from batchcls.evaluation.calibration import CONFIDENCE, NO_THRESHOLD, HoldoutSplit, Temperature
from batchcls.evaluation.classification_metrics import Bin, CategoryCounts, Outcomes, Rows, reliability
from batchcls.evaluation.evaluator import EvaluationResult, Hierarchy
from batchcls.evaluation.hierarchy import PathScores
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.images.load_config import LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.predictor import pixels_of
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.preprocessing import Preprocessing
from batchcls.schema import IMAGE, ITEM_ID, PIXELS, ROW, URI
from batchcls.storage.filesystem import Storage, explain, redact_uri, write_files


def categories_table(result: EvaluationResult) -> pa.Table:
    """Table with one row per category: metrics, threshold, and its held-out acceptance and precision.

    A fraction with a zero denominator is null, and so is the threshold of a category that accepts nothing.
    """
    outcomes, held, limits = result.outcomes, result.held_out, result.thresholds
    counts = CategoryCounts.of(outcomes)
    categories = len(outcomes.labels)
    accepted_outcomes = held.outcomes.take(np.flatnonzero(held.accepted))
    accepted = CategoryCounts.of(accepted_outcomes) if len(accepted_outcomes) else None
    zeros = np.zeros(categories, np.int64)
    paths = [None] * categories if result.paths is None else ["/".join(path) for path in result.paths]
    return pa.table(
        {
            "label": pa.array(outcomes.labels, pa.string()),
            "category_path": pa.array(paths, pa.string()),
            "support": counts.support,
            "predicted": counts.predicted,
            "correct": counts.correct,
            "precision": _nullable(counts.precision),
            "recall": _nullable(counts.recall),
            "f1": _nullable(counts.f1),
            "threshold": pa.array(limits.by_category, mask=limits.by_category == NO_THRESHOLD),
            "own_weight": pa.array(limits.own_weight, pa.float32()),
            "held_out_accepted": accepted.predicted if accepted else zeros,
            "held_out_precision": _nullable(accepted.precision if accepted else np.full(categories, np.nan)),
        }
    )


def reliability_table(result: EvaluationResult) -> pa.Table:
    """Table of the reliability bins before temperature scaling and, if fitted, after it on held-out rows."""
    kinds = {"before": result.before} | ({"held_out": result.held_out.outcomes} if result.temperature else {})
    rows = [
        {"kind": kind, **{name: getattr(bin_, name) for name in Bin.__slots__}}
        for kind, outcomes in kinds.items()
        for bin_ in bins_of(outcomes)
    ]
    return pa.Table.from_pylist(rows)


def bins_of(outcomes: Outcomes) -> tuple[Bin, ...]:
    """Reliability bins of outcomes."""
    return reliability(outcomes.probability, outcomes.correct)


def predictions_table(result: EvaluationResult, notes: pa.Table, rows: Rows) -> pa.Table:
    """Table of all rows of the manifest: the columns of `labeled_rows.NOTES` and the prediction.

    The prediction equals that of `classify`; it is null for rows that were not evaluated.

    Args:
        result: Result for the evaluated rows.
        notes: Table of all rows with the schema `labeled_rows.NOTES`.
        rows: Row numbers of the evaluated rows, ascending.
    """
    outcomes = result.outcomes
    positions = np.full(notes.num_rows, -1, np.int64)
    positions[rows] = np.arange(len(rows))
    indices = pa.array(positions, mask=positions < 0)
    labels = pa.array(outcomes.labels, pa.string())
    predictions = {
        "predicted": labels.take(pa.array(outcomes.predicted)),
        "probability": pa.array(outcomes.probability),
        "correct": pa.array(outcomes.correct),
        "rank": pa.array(outcomes.rank, mask=outcomes.rank < 0),
        "accepted": pa.array(result.accepted),
    }
    if result.hierarchy is not None and result.hierarchy.node is not None:
        node = result.hierarchy.node
        names = pa.array(result.hierarchy.names, pa.string())
        predictions["category_path"] = names.take(pa.array(node, mask=node < 0))
    for name, column in predictions.items():
        notes = notes.append_column(name, column.take(indices))
    return notes


def _nullable(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


METRICS, PAGE = "metrics.json", "evaluate.html"


@dataclass(frozen=True, slots=True)
class EvaluationSubject:
    """The evaluated model or run and the rows it was evaluated on.

    Attributes:
        created: Time of the evaluation, UTC.
        settings: Settings of the job, without secrets.
        manifest: Fingerprint of the manifest.
        model: Description of the bundle or the run, as JSON values.
        notes: Table of all rows with the schema `labeled_rows.NOTES`.
        rows: Row numbers of the evaluated rows.
    """

    created: datetime
    settings: Mapping[str, Any]
    manifest: str
    model: Mapping[str, Any]
    notes: pa.Table
    rows: Rows

    @property
    def excluded(self) -> Counter[str]:
        """Number of excluded rows by reason."""
        return Counter(self.notes.column("reason").drop_null().to_pylist())


def as_json(result: EvaluationResult, subject: EvaluationSubject) -> dict[str, Any]:
    """Contents of metrics.json; fractions are in 0..1."""
    held, target_precision = result.held_out, result.thresholds.target_precision
    return {
        "format": "batchcls-evaluation-1",
        "created": subject.created.isoformat(timespec="seconds"),
        "settings": dict(subject.settings),
        "manifest": subject.manifest,
        "model": dict(subject.model),
        "rows": {
            "manifest": subject.notes.num_rows,
            "evaluated": len(result.outcomes),
            "excluded": dict(subject.excluded.most_common()),
        },
        "metrics": dict(result.metrics),
        "calibration": {
            "temperature": None if result.temperature is None else _temperature_json(result.temperature),
            "ece_before": asdict(result.ece_before),
            "ece_held_out": asdict(held.ece) if result.temperature else None,
        },
        "thresholds": {
            "target_precision": target_precision,
            "confidence": CONFIDENCE,
            "held_out": {
                **_split_json(held.combined),
                "interval_95": held.interval,
                "holds": held.holds(target_precision),
                "halves": [_split_json(half) for half in held.halves],
            },
            "all_rows": _split_json(_in_sample(result)),
        },
        "hierarchy": None if result.hierarchy is None else _hierarchy_json(result.hierarchy),
        "limitations": limitations(result),
    }


def limitations(result: EvaluationResult) -> list[str]:
    """Sentences that state which metrics are missing or inexact, and why."""
    if result.temperature is not None:
        return (
            [
                f"the search for a temperature ended at its limit of {result.temperature.fitted:.3g}: too few or too "
                "many predictions are incorrect to determine a temperature, so none is applied; label more rows"
            ]
            if result.temperature.at_limit
            else []
        )
    lines = [
        "no temperature and no node probabilities: a run stores no logits; evaluate the bundle to get them",
        "the categories are the labels that occur in the manifest or in the run: other categories of the model are "
        "missing, and rows with a label unknown to the model count as incorrect",
    ]
    if result.metrics["top5"] is None:
        lines.append(f"no top-5 accuracy: the run stores only the top {result.ranked_categories} categories")
    return lines


def write_outputs(
    result: EvaluationResult, subject: EvaluationSubject, page: str, output: str, storage: Storage
) -> list[str]:
    """Write all output files, each atomically and metrics.json last, and return their URIs.

    Raises:
        InputError: The first file cannot be written.
        StorageStoppedError: A later file cannot be written.
    """
    files = {
        "categories.parquet": _parquet(categories_table(result)),
        "confusion.parquet": _parquet(result.confusion.as_table()),
        "reliability.parquet": _parquet(reliability_table(result)),
        "predictions.parquet": _parquet(predictions_table(result, subject.notes, subject.rows)),
        PAGE: page.encode(),
        METRICS: f"{json.dumps(as_json(result, subject), indent=2, ensure_ascii=False)}\n".encode(),
    }
    return write_files(output, files, storage)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _in_sample(result: EvaluationResult) -> HoldoutSplit:
    accepted = result.accepted
    return HoldoutSplit(len(accepted), int(accepted.sum()), int(result.outcomes.correct[accepted].sum()))


def _split_json(split: HoldoutSplit) -> dict[str, Any]:
    return {**asdict(split), "precision": split.precision, "coverage": split.coverage}


def _temperature_json(temperature: Temperature) -> dict[str, Any]:
    return {
        **asdict(temperature),
        "value": temperature.value,
        "applied": temperature.applied,
        "at_limit": temperature.at_limit,
    }


def _hierarchy_json(hierarchy: Hierarchy) -> dict[str, Any]:
    return {
        "flat": _scores_json(hierarchy.flat),
        "deepest_held_out": None if hierarchy.deepest is None else _scores_json(hierarchy.deepest),
        "coverage": hierarchy.coverage,
        "depth_thresholds": [value if value <= 1 else None for value in hierarchy.depth_thresholds],
    }


def _scores_json(scores: PathScores) -> dict[str, Any]:
    return {**asdict(scores), "f1": scores.f1}


Curves = Mapping[str, list[float]]
"""Training curves: values of each metric by epoch, and the epochs under the key `EPOCH`."""

EPOCH = "epoch"


def read_curves(uri: str | None, lineage: Mapping[str, Any], storage: Storage) -> Curves:
    """Read training curves: `epoch` and other metrics as lists of equal length; empty if there are none.

    Args:
        uri: URI of a JSON file; None reads `curves` from the lineage.
        lineage: Lineage of the bundle.
        storage: Storage that contains the file.

    Raises:
        InputError: The file cannot be read or has another format.
    """
    if uri is None:
        curves, name = lineage.get("curves"), "the bundle's lineage"
    else:
        name = f"--training-curves {redact_uri(uri)}"
        with explain(uri):
            data = storage.read_bytes(uri)
        try:
            curves = json.loads(data)
        except ValueError as error:
            raise InputError(f"{name} is not JSON ({error})") from None
    if curves is None:
        return {}
    if not _are_curves(curves):
        raise InputError(
            f'{name}: expected curves of the form {{"epoch": [1, 2], "loss": [0.9, 0.7], "learning_rate": [...]}}, '
            "lists of numbers of equal length"
        )
    return {str(key): [float(value) for value in values] for key, values in curves.items()}


def _are_curves(curves: Any) -> bool:
    if not isinstance(curves, dict) or EPOCH not in curves:
        return False
    lists = list(curves.values())
    return (
        all(isinstance(values, list) for values in lists)
        and len({len(values) for values in lists}) == 1
        and len(lists[0]) > 0
        and all(isinstance(value, int | float) for values in lists for value in values)
    )


SIDE = 112
"""Width and height of a thumbnail in pixels."""

_MAX_PAIRS, _EXAMPLES_PER_PAIR = 8, 4
_ROWS_PER_TABLE = 1024
_JPEG_QUALITY = 72


@dataclass(frozen=True, slots=True)
class WorstPair:
    """A frequent confusion: label, predicted category, number of rows, and row numbers of a few examples.

    The examples have the highest probabilities, in descending order.
    """

    label: str
    predicted: str
    rows: int
    examples: tuple[int, ...]


def worst_pairs(result: EvaluationResult, rows: Rows) -> tuple[WorstPair, ...]:
    """The most frequent confusions, at most eight.

    Args:
        result: Result for the evaluated rows.
        rows: Row numbers of these rows in the manifest.
    """
    outcomes = result.outcomes
    pairs = []
    for truth, predicted, count in result.confusion.worst(_MAX_PAIRS):
        confused = np.flatnonzero((outcomes.truth == truth) & (outcomes.predicted == predicted))
        by_confidence = np.argsort(-outcomes.probability[confused], kind="stable")
        examples = confused[by_confidence[:_EXAMPLES_PER_PAIR]]
        names = outcomes.labels[truth], outcomes.labels[predicted]
        pairs.append(WorstPair(*names, count, tuple(map(int, rows[examples]))))
    return tuple(pairs)


def thumbnails(pairs: Sequence[WorstPair], labeled: LabeledManifest, load: LoadSettings) -> dict[int, str]:
    """Thumbnails of the examples by row number, as `data:` URIs of JPEG files. Unreadable images are omitted.

    Args:
        pairs: Confusions whose examples are loaded.
        labeled: Manifest that contains the examples.
        load: Settings for fetching and decoding.
    """
    example_rows = sorted({row for pair in pairs for row in pair.examples})
    if not example_rows:
        return {}
    size = Preprocessing(
        input_height=SIDE,
        input_width=SIDE,
        resize_height=SIDE,
        resize_width=SIDE,
        mean=(0,) * 3,
        std=(1,) * 3,
    )
    loader = Loader(replace(load, preprocessing=size, decode_margin=2.0))
    images = {}
    for block in loader.load(iter([_read_rows(example_rows, labeled)]), {}):
        pixels = block.column(PIXELS).combine_chunks()
        decoded = block.column(ROW).filter(pixels.is_valid()).to_pylist()
        for row, image in zip(decoded, pixels_of(pixels, size.shape), strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=_JPEG_QUALITY)
            images[row] = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return images


def _read_rows(rows: Sequence[int], labeled: LabeledManifest) -> pa.Table:
    reader = FragmentReader(labeled.manifest.columns, labeled.storage)
    tables = []
    for fragment in labeled.manifest.fragments(repeat(_ROWS_PER_TABLE)):
        offsets = [row - fragment.first_row for row in rows if 0 <= row - fragment.first_row < fragment.rows]
        if offsets:
            (table,) = reader.read(fragment, _ROWS_PER_TABLE)
            tables.append(table.take(offsets))
    return pa.concat_tables(tables).select([ROW, ITEM_ID, URI, IMAGE])
