"""Determines the categories of a training run, their fixed order and warnings about them.

The order is the order of the network's outputs and is stored in the bundle. All of it is arithmetic
on counts of distinct labels, so 10,000 categories and millions of rows take seconds.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.errors import InputError
from batchcls.manifest.labeled_manifest import UNKNOWN_CLASS, LabelColumn
from batchcls.models.labels import Labels, check_labels

_logger = logging.getLogger(__name__)

_NAMED = 10
_FEWEST = 2

Counts = npt.NDArray[np.int64]
Classes = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Categories:
    """K categories in the order of the network's outputs, and their rows.

    Attributes:
        labels: K names.
        training: K numbers of training rows.
        validation: K numbers of validation rows; None where there is no validation manifest.
        notes: what a person should know, a sentence each, with at most ten names in it.
    """

    labels: Labels
    training: Counts
    validation: Counts | None
    notes: tuple[str, ...]

    def log_warnings(self) -> None:
        """Every note as a warning."""
        for note in self.notes:
            _logger.warning("%s", note)


def resolve_category_order(
    training: LabelColumn, given: Sequence[str] | None, known: Sequence[str]
) -> Labels:
    """The categories in their order.

    Args:
        training: labels of the training rows.
        given: the list that the user named with --labels; it is taken as it is.
        known: the categories of the bundle that training starts from. Their order is kept where all
            labels are among them, so that class indices of earlier nights keep their meaning.

    Returns:
        `given`, else `known`, else the training labels sorted by their characters' code points, which
        is the same order on every machine.

    Raises:
        InputError: a training label is not in `given`, or there are fewer than two categories.
    """
    found = training.distinct.to_pylist()
    if given is not None:
        listed = set(given)
        missing = sorted(label for label in found if label not in listed)
        if missing:
            raise InputError(
                f"--labels lacks {len(missing)} of the {len(found)} categories in the training manifest: "
                f"{some(missing)}; add them to the file, or take their rows out of the manifest"
            )
        labels = tuple(given)
    else:
        labels = tuple(known) if set(found) <= set(known) else tuple(sorted(found))
    if len(labels) < _FEWEST:
        raise InputError(f"there is only the category {labels[0]!r}; a classifier needs at least two")
    return check_labels(labels, "the training manifest")


def describe_categories(
    labels: Sequence[str], training: LabelColumn, validation: LabelColumn | None = None
) -> Categories:
    """Count the rows of each category and note what is odd.

    Args:
        labels: K names, as `resolve_category_order` gives them.
        training: labels of the training rows, all of them in `labels`.
        validation: labels of the validation rows; a label that is not in `labels` is noted, and its
            rows have the class UNKNOWN_CLASS, which no answer can be.

    Raises:
        InputError: no validation row has a label of `labels`.
    """
    names = pa.array(labels, pa.string())
    trained = count_classes(training.classes(names), len(labels))
    notes = [
        *_without_label("training", training, "are not trained on"),
        *_about("without a training row, which the network cannot learn", labels, trained == 0),
        *_about("with a single training row, of which none can be held out", labels, trained == 1),
        *_nearly_equal(labels),
    ]
    if validation is None:
        return Categories(tuple(labels), trained, None, tuple(notes))
    classes = validation.classes(names)
    validated = count_classes(classes, len(labels))
    unseen_rows = int((classes == UNKNOWN_CLASS).sum())
    if not validated.any():
        raise InputError(
            f"none of the {len(classes)} validation rows has a category of the training manifest; it has "
            f"{some(sorted(validation.distinct.to_pylist()))}, training has {some(labels)}"
        )
    if unseen_rows:
        known = set(labels)
        unseen = sorted(label for label in validation.distinct.to_pylist() if label not in known)
        notes.append(
            f"{unseen_rows} validation rows have {_counted(len(unseen))} that training does not have, and "
            f"count as answered wrongly: {some(unseen)}"
        )
    notes += _without_label("validation", validation, "are not counted")
    trained_only = (validated == 0) & (trained > 0)
    notes += _about("without a validation row, of which nothing is measured", labels, trained_only)
    return Categories(tuple(labels), trained, validated, tuple(notes))


def count_classes(classes: Classes, count: int) -> Counts:
    """Rows of each of `count` classes; rows without a known label count nowhere."""
    return np.bincount(classes[classes >= 0], minlength=count)


def some(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _counted(categories: int) -> str:
    return "1 category" if categories == 1 else f"{categories} categories"


def _about(what: str, labels: Sequence[str], chosen: npt.NDArray[np.bool_]) -> list[str]:
    named = [labels[place] for place in np.flatnonzero(chosen).tolist()]
    return [f"{_counted(len(named))} {what}: {some(named)}"] if named else []


def _without_label(which: str, column: LabelColumn, consequence: str) -> list[str]:
    rows = column.unlabeled_rows
    if not len(rows):
        return []
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return [
        f"{len(rows)} of {len(column.codes)} {which} rows have no label (null or blank) and {consequence}: "
        f"rows {', '.join(map(str, rows[:_NAMED]))}{more}"
    ]


def _nearly_equal(labels: Sequence[str]) -> list[str]:
    """Labels that differ in case or blanks only are two categories here and one mistake there."""
    first: dict[str, str] = {}
    pairs = []
    for label in labels:
        folded = " ".join(label.casefold().split())
        if folded in first:
            pairs.append(f"{first[folded]!r} and {label!r}")
        first.setdefault(folded, label)
    if not pairs:
        return []
    return [f"{2 * len(pairs)} categories differ in pairs, in case or blanks only: {some(pairs)}"]
