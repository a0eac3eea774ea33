"""Split labels of rows by columns of the manifest, as the rules of a label map say.

Rows are split when they are written, after predictions have been copied between rows of the same image.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.models.label_map import LabelSplit, SplitRule
from batchcls.schema import TOP_K_TYPE


def can_be_compared(kind: pa.DataType) -> bool:
    """Whether rules can read a column of this type: text, integers and booleans, which are compared as text."""
    if pa.types.is_dictionary(kind):
        return can_be_compared(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def split_labels(predictions: pa.Table, splits: Mapping[str, LabelSplit]) -> pa.Table:
    """Replace split labels in the columns label and top_k by those that the rules give to each row.

    Args:
        predictions: rows with a prediction, with the columns that the rules read.
        splits: by the label that is split; a row without a label stays without one.
    """
    label = _combined(predictions.column("label"))
    top_k = _combined(predictions.column("top_k"))
    offsets = pc.subtract(top_k.offsets, top_k.offsets[0])
    rows = pa.array(np.repeat(np.arange(len(top_k)), np.diff(offsets.to_numpy())))
    entries = top_k.flatten()
    names = entries.field("label")
    for whole, split in splits.items():
        targets = _targets(predictions, split)
        # The names before any split, so that a default with the name of the split label is not split again.
        label = pc.if_else(pc.equal(predictions.column("label"), whole), targets, label)
        names = pc.if_else(pc.equal(entries.field("label"), whole), targets.take(rows), names)
    others = [entries.field(name) for name in ("class_index", "probability")]
    structs = pa.StructArray.from_arrays([names, *others], fields=list(TOP_K_TYPE.value_type))
    changed = {"label": label, "top_k": pa.ListArray.from_arrays(offsets, structs, type=TOP_K_TYPE)}
    for name, column in changed.items():
        predictions = predictions.set_column(predictions.column_names.index(name), name, column)
    return predictions


def _targets(rows: pa.Table, split: LabelSplit) -> pa.Array:
    """The label of each row if it has the split label."""
    targets = pa.array(np.full(rows.num_rows, split.default, object), pa.string())
    for rule in reversed(split.rules):
        targets = pc.if_else(_matches(rows, rule), pa.scalar(rule.to, pa.string()), targets)
    return _combined(targets)


def _matches(rows: pa.Table, rule: SplitRule) -> pa.Array:
    values = _combined(rows.column(rule.column)).cast(pa.string())
    if rule.values is not None:
        return pc.is_in(values, pa.array(rule.values, pa.string()))
    return pc.match_substring_regex(values, pattern=rule.pattern).fill_null(False)


def _combined(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
