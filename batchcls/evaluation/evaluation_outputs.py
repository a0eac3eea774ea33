"""Writes the outputs of an evaluation: metrics.json, four tables and a page."""

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
from batchcls.evaluation.calibration import CONFIDENCE, NEVER, HoldoutSplit, Temperature
from batchcls.evaluation.classification_metrics import Bin, CategoryCounts, Outcomes, Rows, reliability
from batchcls.evaluation.evaluator import Evaluated, Hierarchy
from batchcls.evaluation.hierarchy import PathScores
from batchcls.evaluation.labeled_rows import LabeledManifest
from batchcls.images.load_config import LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.predictor import pixels_of
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.preprocessing import Preprocessing
from batchcls.schema import IMAGE, ITEM_ID, PIXELS, ROW, URI
from batchcls.storage.filesystem import Storage, explain, redact_uri, write_files


def categories_table(found: Evaluated) -> pa.Table:
    """One row a category: how right its answers are, its threshold, and what that is worth on held-out rows.

    A share that would divide by zero is null, and so is the threshold of a category that is never sure enough.
    """
    outcomes, held, limits = found.outcomes, found.held_out, found.thresholds
    counts = CategoryCounts.of(outcomes)
    categories = len(outcomes.labels)
    taken = held.outcomes.take(np.flatnonzero(held.accepted))
    accepted = CategoryCounts.of(taken) if len(taken) else None
    zeros = np.zeros(categories, np.int64)
    paths = [None] * categories if found.paths is None else ["/".join(path) for path in found.paths]
    return pa.table(
        {
            "label": pa.array(outcomes.labels, pa.string()),
            "category_path": pa.array(paths, pa.string()),
            "support": counts.support,
            "answered": counts.answered,
            "right": counts.right,
            "precision": _shares(counts.precision),
            "recall": _shares(counts.recall),
            "f1": _shares(counts.f1),
            "threshold": pa.array(limits.by_category, mask=limits.by_category == NEVER),
            "own_weight": pa.array(limits.own_weight, pa.float32()),
            "held_out_accepted": accepted.answered if accepted else zeros,
            "held_out_precision": _shares(accepted.precision if accepted else np.full(categories, np.nan)),
        }
    )


def reliability_table(found: Evaluated) -> pa.Table:
    """The bins before the temperature and, where there is one, after it, fitted on the other half of the rows."""
    kinds = {"before": found.before} | ({"held_out": found.held_out.outcomes} if found.temperature else {})
    rows = [
        {"kind": kind, **{name: getattr(bin_, name) for name in Bin.__slots__}}
        for kind, outcomes in kinds.items()
        for bin_ in bins_of(outcomes)
    ]
    return pa.Table.from_pylist(rows)


def bins_of(outcomes: Outcomes) -> tuple[Bin, ...]:
    """The reliability of outcomes."""
    return reliability(outcomes.probability, outcomes.right)


def predictions_table(found: Evaluated, notes: pa.Table, rows: Rows) -> pa.Table:
    """Every row of the manifest: `labeled.NOTES`, and for judged ones the answer as `classify` would give it.

    Args:
        found: of the judged rows.
        notes: of all rows.
        rows: numbers of the judged ones, ascending.
    """
    outcomes = found.outcomes
    places = np.full(notes.num_rows, -1, np.int64)
    places[rows] = np.arange(len(rows))
    taken = pa.array(places, mask=places < 0)
    labels = pa.array(outcomes.labels, pa.string())
    answers = {
        "predicted": labels.take(pa.array(outcomes.predicted)),
        "probability": pa.array(outcomes.probability),
        "right": pa.array(outcomes.right),
        "rank": pa.array(outcomes.rank, mask=outcomes.rank < 0),
        "accepted": pa.array(found.accepted),
    }
    if found.hierarchy is not None and found.hierarchy.place is not None:
        place = found.hierarchy.place
        names = pa.array(found.hierarchy.names, pa.string())
        answers["category_path"] = names.take(pa.array(place, mask=place < 0))
    for name, column in answers.items():
        notes = notes.append_column(name, column.take(taken))
    return notes


def _shares(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


METRICS, PAGE = "metrics.json", "evaluate.html"


@dataclass(frozen=True, slots=True)
class EvaluationSubject:
    """What was evaluated, when and on what.

    Attributes:
        created: UTC.
        settings: of the job, without anything secret.
        manifest: its fingerprint.
        model: what is known of the bundle or the run, as JSON values.
        notes: `labeled.NOTES` of all rows.
        rows: numbers of the judged ones.
    """

    created: datetime
    settings: Mapping[str, Any]
    manifest: str
    model: Mapping[str, Any]
    notes: pa.Table
    rows: Rows

    @property
    def left_out(self) -> Counter[str]:
        """Rows that were not judged, by reason."""
        return Counter(self.notes.column("reason").drop_null().to_pylist())


def as_json(found: Evaluated, subject: EvaluationSubject) -> dict[str, Any]:
    """The contents of metrics.json; shares are in 0..1."""
    held, wished = found.held_out, found.thresholds.target_precision
    return {
        "format": "batchcls-evaluation-1",
        "created": subject.created.isoformat(timespec="seconds"),
        "settings": dict(subject.settings),
        "manifest": subject.manifest,
        "model": dict(subject.model),
        "rows": {
            "manifest": subject.notes.num_rows,
            "judged": len(found.outcomes),
            "left_out": dict(subject.left_out.most_common()),
        },
        "metrics": dict(found.metrics),
        "calibration": {
            "temperature": None if found.temperature is None else _temperature(found.temperature),
            "ece_before": asdict(found.ece_before),
            "ece_held_out": asdict(held.ece) if found.temperature else None,
        },
        "thresholds": {
            "target_precision": wished,
            "confidence": CONFIDENCE,
            "held_out": {
                **_half(held.together),
                "interval_95": held.interval,
                "holds": held.holds(wished),
                "halves": [_half(half) for half in held.halves],
            },
            "all_rows": _half(_in_sample(found)),
        },
        "hierarchy": None if found.hierarchy is None else _hierarchy(found.hierarchy),
        "approximate": approximations(found),
    }


def approximations(found: Evaluated) -> list[str]:
    """What is missing or less than exact, and why."""
    if found.temperature is not None:
        return (
            [
                f"the search for a temperature ended at its limit, {found.temperature.fitted:.3g}: so few of the rows "
                "are wrong, or so many, that they do not determine one and none is applied; label more rows"
            ]
            if found.temperature.at_limit
            else []
        )
    lines = [
        "no temperature and no masses of nodes: a run keeps no logits; evaluate the bundle for them",
        "categories are the labels that occur: one of the model that neither the manifest nor the run names is "
        "not there, and a label that the model does not have counts as wrong",
    ]
    if found.metrics["top5"] is None:
        lines.append(f"no top-5: the run has a top_k of {found.kept}")
    return lines


def write_outputs(
    found: Evaluated, subject: EvaluationSubject, page: str, output: str, storage: Storage
) -> list[str]:
    """Write everything, each file whole, metrics.json last; returns where.

    Raises:
        InputError, StorageStoppedError: as `storage.write_files` says.
    """
    files = {
        "categories.parquet": _parquet(categories_table(found)),
        "confusion.parquet": _parquet(found.confusion.as_table()),
        "reliability.parquet": _parquet(reliability_table(found)),
        "predictions.parquet": _parquet(predictions_table(found, subject.notes, subject.rows)),
        PAGE: page.encode(),
        METRICS: f"{json.dumps(as_json(found, subject), indent=2, ensure_ascii=False)}\n".encode(),
    }
    return write_files(output, files, storage)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _in_sample(found: Evaluated) -> HoldoutSplit:
    accepted = found.accepted
    return HoldoutSplit(len(accepted), int(accepted.sum()), int(found.outcomes.right[accepted].sum()))


def _half(half: HoldoutSplit) -> dict[str, Any]:
    return {**asdict(half), "precision": half.precision, "coverage": half.coverage}


def _temperature(found: Temperature) -> dict[str, Any]:
    return {**asdict(found), "value": found.value, "applied": found.applied, "at_limit": found.at_limit}


def _hierarchy(found: Hierarchy) -> dict[str, Any]:
    return {
        "flat": _scores(found.flat),
        "deepest_held_out": None if found.deepest is None else _scores(found.deepest),
        "named": found.named,
        "depth_thresholds": [value if value <= 1 else None for value in found.depth_thresholds],
    }


def _scores(scores: PathScores) -> dict[str, Any]:
    return {**asdict(scores), "f1": scores.f1}


Curves = Mapping[str, list[float]]

EPOCH = "epoch"


def read_curves(uri: str | None, lineage: Mapping[str, Any], storage: Storage) -> Curves:
    """`epoch` and whatever goes with it, lists of numbers of one length; empty where nothing is known.

    Args:
        uri: a JSON file; None: the lineage's own `curves`.
        lineage: of the bundle.
        storage: how to reach the file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    if uri is None:
        found, name = lineage.get("curves"), "the bundle's lineage"
    else:
        name = f"--training-curves {redact_uri(uri)}"
        with explain(uri):
            data = storage.read_bytes(uri)
        try:
            found = json.loads(data)
        except ValueError as error:
            raise InputError(f"{name} is not JSON ({error})") from None
    if found is None:
        return {}
    if not _are_curves(found):
        raise InputError(
            f'{name}: curves have the form {{"epoch": [1, 2], "loss": [0.9, 0.7], "learning_rate": [...]}}, lists of '
            "numbers of one length"
        )
    return {str(key): [float(value) for value in values] for key, values in found.items()}


def _are_curves(found: Any) -> bool:
    if not isinstance(found, dict) or EPOCH not in found:
        return False
    lists = list(found.values())
    return (
        all(isinstance(values, list) for values in lists)
        and len({len(values) for values in lists}) == 1
        and len(lists[0]) > 0
        and all(isinstance(value, int | float) for values in lists for value in values)
    )


SIDE = 112
"""Pixels of a thumbnail's side."""

_PAIRS, _EACH = 8, 4
_ROWS_PER_TABLE = 1024
_QUALITY = 72


@dataclass(frozen=True, slots=True)
class WorstPair:
    """Two categories that are mixed up, how often, and the manifest's rows of a few examples, the surest first."""

    label: str
    predicted: str
    rows: int
    examples: tuple[int, ...]


def worst_pairs(found: Evaluated, rows: Rows) -> tuple[WorstPair, ...]:
    """The pairs of categories that are mixed up most often, a few of them.

    Args:
        found: of the judged rows.
        rows: numbers of these rows in the manifest.
    """
    outcomes = found.outcomes
    pairs = []
    for truth, predicted, count in found.confusion.worst(_PAIRS):
        places = np.flatnonzero((outcomes.truth == truth) & (outcomes.predicted == predicted))
        surest = places[np.argsort(-outcomes.probability[places], kind="stable")[:_EACH]]
        names = outcomes.labels[truth], outcomes.labels[predicted]
        pairs.append(WorstPair(*names, count, tuple(map(int, rows[surest]))))
    return tuple(pairs)


def thumbnails(pairs: Sequence[WorstPair], labeled: LabeledManifest, load: LoadSettings) -> dict[int, str]:
    """Images of the examples by row, as `data:` URIs of JPEGs; one that cannot be read is left out.

    Args:
        pairs: whose examples are wanted.
        labeled: where they stand.
        load: how images are fetched and which are refused.
    """
    wanted = sorted({row for pair in pairs for row in pair.examples})
    if not wanted:
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
    for block in loader.load(iter([_rows(wanted, labeled)]), {}):
        pixels = block.column(PIXELS).combine_chunks()
        good = block.column(ROW).filter(pixels.is_valid()).to_pylist()
        for row, image in zip(good, pixels_of(pixels, size.shape), strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=_QUALITY)
            images[row] = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return images


def _rows(wanted: Sequence[int], labeled: LabeledManifest) -> pa.Table:
    reader = FragmentReader(labeled.manifest.columns, labeled.storage)
    tables = []
    for fragment in labeled.manifest.fragments(repeat(_ROWS_PER_TABLE)):
        inside = [row for row in wanted if 0 <= row - fragment.first_row < fragment.rows]
        if inside:
            (table,) = reader.read(fragment, _ROWS_PER_TABLE)
            tables.append(table.take([row - fragment.first_row for row in inside]))
    return pa.concat_tables(tables).select([ROW, ITEM_ID, URI, IMAGE])
