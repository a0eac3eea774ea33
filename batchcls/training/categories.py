"""Determines the categories of a training run, their fixed order and warnings about them.

The order is the order of the outputs of the network and is stored in the bundle. All computations use counts of
distinct labels, so 10,000 categories and millions of rows take seconds.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.errors import InputError
from batchcls.manifest.labeled_manifest import UNKNOWN_CLASS, LabelColumn
from batchcls.models.labels import CategoryPaths, Labels, check_labels
from batchcls.models.model_bundle import Bundle, BundleConfig

_logger = logging.getLogger(__name__)

_MAX_NAMES = 10
_MIN_CATEGORIES = 2

Counts = npt.NDArray[np.int64]
Classes = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Categories:
    """K categories in the order of the outputs of the network.

    Attributes:
        labels: names of the K categories.
        training: number of training rows of each category, of shape (K,).
        validation: number of validation rows of each category, of shape (K,); None without a validation manifest.
        warnings: sentences about unusual labels, each with at most ten names.
    """

    labels: Labels
    training: Counts
    validation: Counts | None
    warnings: tuple[str, ...]

    def log_warnings(self) -> None:
        """Log all warnings."""
        for note in self.warnings:
            _logger.warning("%s", note)


def resolve_category_order(
    training: LabelColumn, given_labels: Sequence[str] | None, known_labels: Sequence[str]
) -> Labels:
    """Return the categories in order.

    Args:
        training: labels of the training rows.
        given_labels: the labels of --labels, which are used unchanged; None without that flag.
        known_labels: the categories of the initial bundle. They are used, in their order, if they contain all
            training labels, so that class indices do not change between runs.

    Returns:
        `given_labels`, or `known_labels`, or the training labels sorted by code points, which is the same order on
        every machine.

    Raises:
        InputError: a training label is not in `given_labels`, or there are fewer than two categories.
    """
    training_labels = training.distinct.to_pylist()
    if given_labels is not None:
        listed = set(given_labels)
        missing = sorted(label for label in training_labels if label not in listed)
        if missing:
            raise InputError(
                f"--labels lacks {len(missing)} of the {len(training_labels)} categories in the training manifest: "
                f"{format_names(missing)}; add them to the file, or remove their rows from the manifest"
            )
        labels = tuple(given_labels)
    else:
        labels = (
            tuple(known_labels)
            if set(training_labels) <= set(known_labels)
            else tuple(sorted(training_labels))
        )
    if len(labels) < _MIN_CATEGORIES:
        raise InputError(f"there is only the category {labels[0]!r}; a classifier needs at least two")
    return check_labels(labels, "the training manifest")


def describe_categories(
    labels: Sequence[str], training: LabelColumn, validation: LabelColumn | None = None
) -> Categories:
    """Count the rows of each category, and collect warnings.

    Args:
        labels: names of the K categories, see `resolve_category_order`.
        training: labels of the training rows, all of them in `labels`.
        validation: labels of the validation rows. Rows whose label is not in `labels` have the class UNKNOWN_CLASS,
            which is never predicted, and cause a warning.

    Raises:
        InputError: no validation row has a label of `labels`.
    """
    names = pa.array(labels, pa.string())
    training_counts = count_classes(training.classes(names), len(labels))
    warnings = [
        *_unlabeled_warning("training", training, "are not trained on"),
        *_category_warning(
            "without a training row, which the network cannot learn", labels, training_counts == 0
        ),
        *_category_warning(
            "with a single training row, which cannot be held out", labels, training_counts == 1
        ),
        *_similar_labels_warning(labels),
    ]
    if validation is None:
        return Categories(tuple(labels), training_counts, None, tuple(warnings))
    classes = validation.classes(names)
    validation_counts = count_classes(classes, len(labels))
    unknown_rows = int((classes == UNKNOWN_CLASS).sum())
    if not validation_counts.any():
        raise InputError(
            f"none of the {len(classes)} validation rows has a category of the training manifest; it has "
            f"{format_names(sorted(validation.distinct.to_pylist()))}, training has {format_names(labels)}"
        )
    if unknown_rows:
        known_labels = set(labels)
        unknown_labels = sorted(
            label for label in validation.distinct.to_pylist() if label not in known_labels
        )
        warnings.append(
            f"{unknown_rows} validation rows have {_count_categories(len(unknown_labels))} that training does not "
            f"have, and count as wrong predictions: {format_names(unknown_labels)}"
        )
    warnings += _unlabeled_warning("validation", validation, "are not counted")
    not_validated = (validation_counts == 0) & (training_counts > 0)
    warnings += _category_warning(
        "without a validation row, whose accuracy is not measured", labels, not_validated
    )
    return Categories(tuple(labels), training_counts, validation_counts, tuple(warnings))


def complete_category_paths(config: BundleConfig, labels: Labels) -> CategoryPaths | None:
    """Return a path in the category tree of a bundle for each of `labels`.

    Categories of the bundle keep their paths. The name of another one is its path if the names in the bundle are paths;
    otherwise it is at the top level of the tree, and a warning names it.

    Returns:
        None if the bundle has no category paths, or none of these categories.
    """
    known = dict(zip(config.labels, config.category_paths or (), strict=False))
    if not known.keys() & set(labels):
        return None
    names_are_paths = all("/".join(path) == label for label, path in known.items())
    new = [label for label in labels if label not in known]
    if new and not names_are_paths:
        _logger.warning(
            "%s without a path in the category tree, at its top level: %s",
            _count_categories(len(new)),
            format_names(new),
        )
    return tuple(
        known[label] if label in known else tuple(label.split("/")) if names_are_paths else (label,)
        for label in labels
    )


def warn_about_dropped_metadata(bundle: Bundle, labels: Labels) -> None:
    """Warn about metadata that training drops: the calibration, and category paths if no category is kept."""
    config = bundle.config
    if config.calibration is not None:
        _logger.warning(
            "the calibration of --model (temperature %.3g and thresholds) is not valid for other weights and is "
            "dropped; run `evaluate --write-bundle` on the new bundle before `classify --abstain`",
            config.calibration.temperature,
        )
    if config.category_paths is not None and not set(config.labels) & set(labels):
        _logger.warning(
            "the category paths of --model name none of the categories and are dropped; to restore them, use paths as "
            "labels with `evaluate --labels-are-paths --write-bundle`"
        )


def count_classes(classes: Classes, count: int) -> Counts:
    """Count the rows of each of `count` classes; rows without a known label are not counted."""
    return np.bincount(classes[classes >= 0], minlength=count)


def format_names(names: Sequence[str]) -> str:
    """Format the first ten names and the number of further names."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _count_categories(categories: int) -> str:
    return "1 category" if categories == 1 else f"{categories} categories"


def _category_warning(text: str, labels: Sequence[str], mask: npt.NDArray[np.bool_]) -> list[str]:
    names = [labels[index] for index in np.flatnonzero(mask).tolist()]
    return [f"{_count_categories(len(names))} {text}: {format_names(names)}"] if names else []


def _unlabeled_warning(name: str, column: LabelColumn, consequence: str) -> list[str]:
    rows = column.unlabeled_rows
    if not len(rows):
        return []
    more = f" and {len(rows) - _MAX_NAMES} more" if len(rows) > _MAX_NAMES else ""
    return [
        f"{len(rows)} of {len(column.codes)} {name} rows have no label (null or blank) and {consequence}: "
        f"rows {', '.join(map(str, rows[:_MAX_NAMES]))}{more}"
    ]


def _similar_labels_warning(labels: Sequence[str]) -> list[str]:
    """Warn about labels that differ only in case or whitespace, which are usually mistakes."""
    first: dict[str, str] = {}
    pairs = []
    for label in labels:
        folded = " ".join(label.casefold().split())
        if folded in first:
            pairs.append(f"{first[folded]!r} and {label!r}")
        first.setdefault(folded, label)
    if not pairs:
        return []
    return [f"{2 * len(pairs)} categories differ in pairs only in case or whitespace: {format_names(pairs)}"]
