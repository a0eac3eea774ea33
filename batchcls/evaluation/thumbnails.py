"""Small pictures of rows that were answered wrongly, for a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import pyarrow as pa
from PIL import Image

from batchcls.evaluation.evaluated import Evaluated
from batchcls.evaluation.labelled import Labelled
from batchcls.evaluation.outcomes import Rows
from batchcls.images.load import Loader
from batchcls.images.settings import LoadSettings
from batchcls.inference.predictor import pixels_of
from batchcls.manifest_reader import FragmentReader
from batchcls.preprocessing import Preprocessing
from batchcls.schema import IMAGE, ITEM_ID, PIXELS, ROW, URI

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


def thumbnails(pairs: Sequence[WorstPair], labelled: Labelled, load: LoadSettings) -> dict[int, str]:
    """Pictures of the examples by row, as `data:` URIs of JPEGs; one that cannot be read is left out.

    Args:
        pairs: whose examples are wanted.
        labelled: where they stand.
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
    pictures = {}
    for block in loader.load(iter([_rows(wanted, labelled)]), {}):
        pixels = block.column(PIXELS).combine_chunks()
        good = block.column(ROW).filter(pixels.is_valid()).to_pylist()
        for row, picture in zip(good, pixels_of(pixels, size.shape), strict=True):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=_QUALITY)
            pictures[row] = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return pictures


def _rows(wanted: Sequence[int], labelled: Labelled) -> pa.Table:
    reader = FragmentReader(labelled.manifest.columns, labelled.storage)
    tables = []
    for fragment in labelled.manifest.fragments(repeat(_ROWS_PER_TABLE)):
        inside = [row for row in wanted if 0 <= row - fragment.first_row < fragment.rows]
        if inside:
            (table,) = reader.read(fragment, _ROWS_PER_TABLE)
            tables.append(table.take([row - fragment.first_row for row in inside]))
    return pa.concat_tables(tables).select([ROW, ITEM_ID, URI, IMAGE])
