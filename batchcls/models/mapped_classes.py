"""The classes of a bundle after a label map: their labels, category paths and thresholds, and sums of probabilities.

Letters: N images, K classes of the bundle, M classes after the map.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.models.label_map import LabelMap
from batchcls.models.labels import parse_category_path
from batchcls.models.model_bundle import BundleConfig, Calibration, sha256_hex
from batchcls.storage.documents import Count, StoredRecord

Floats = npt.NDArray[np.float32]

_Path = tuple[str, ...]


class ClassGroups(StoredRecord):
    """Which classes of a bundle form one class after a map; the others keep their order.

    Attributes:
        classes: K.
        merged: class indices of each merged class, which takes the position of the lowest one.
        retired: class indices whose probabilities belong to no class after the map.
    """

    classes: Count
    merged: tuple[tuple[Count, ...], ...] = ()
    retired: tuple[Count, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Sequence[int]], classes: int) -> Self:
        """Groups from the class indices of each of M classes."""
        kept = {index for group in members for index in group}
        return cls(
            classes=classes,
            merged=tuple(tuple(group) for group in members if len(group) > 1),
            retired=tuple(index for index in range(classes) if index not in kept),
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the sums; empty if each class stays as it is."""
        if not self.merged and not self.retired:
            return ""
        return sha256_hex(json.dumps([self.merged, self.retired]).encode())

    def sum(self, probabilities: Floats) -> Floats:
        """Return the N,M sums of N,K probabilities over the classes of each group."""
        if not self.merged and not self.retired:
            return probabilities
        dropped = {*self.retired, *(index for group in self.merged for index in group[1:])}
        kept = [index for index in range(self.classes) if index not in dropped]
        position = {index: number for number, index in enumerate(kept)}
        sums: Floats = probabilities[:, kept]
        for group in self.merged:
            total = probabilities[:, list(group)].sum(axis=1)
            sums[:, position[group[0]]] = np.minimum(total, np.float32(1))
        return sums


@dataclass(frozen=True)
class MappedClasses:
    """The classes of a bundle after a label map.

    Attributes:
        config: record of the bundle with the labels, category paths and thresholds after the map; no golden outputs.
        groups: sums of probabilities that give the classes of `config`; None without a map.
        label_map: the map; None without one.
    """

    config: BundleConfig
    groups: ClassGroups | None = None
    label_map: LabelMap | None = None

    @classmethod
    def of(cls, config: BundleConfig, label_map: LabelMap | None) -> Self:
        """Apply a map to the record of a bundle.

        Raises:
            InputError: the bundle does not have a label of the map, or labels would not be unique afterwards.
        """
        if label_map is None:
            return cls(config)
        _require_known(label_map, config)
        index_of = {label: index for index, label in enumerate(config.labels)}
        members: dict[str, list[int]] = {}
        for label in config.labels:
            target = label_map.unsplit(label)
            if target is not None:
                members.setdefault(target, []).append(index_of[label])
        _require_unique(label_map, config, members)
        labels = tuple(members)
        changes = {
            "labels": labels,
            "category_paths": _paths(label_map, config, members),
            "golden": None,
        }
        mapped = config.model_copy(update=changes)
        if config.calibration is not None:
            calibration = _calibration(config.calibration, label_map, config.labels, mapped, members)
            mapped = mapped.model_copy(update={"calibration": calibration})
        return cls(mapped, ClassGroups.of(list(members.values()), len(config.labels)), label_map)


def _require_known(label_map: LabelMap, config: BundleConfig) -> None:
    """Raise InputError for a label that the bundle does not have."""
    replacements = (label for label in label_map.retire.values() if label)
    for label in (*label_map.mentioned(), *replacements):
        if label not in config.labels:
            near = difflib.get_close_matches(label, config.labels, 1)
            hint = f"; did you mean {near[0]}?" if near else "; a map names the labels of the bundle"
            raise InputError(f"--label-map: the bundle has no label {label}{hint}")


def _require_unique(label_map: LabelMap, config: BundleConfig, members: dict[str, list[int]]) -> None:
    """Raise InputError if a new label exists already, or a table names a label that does not exist after the map."""
    if not members:
        raise InputError("--label-map retires every label; keep at least one")
    mentioned = frozenset(label_map.mentioned())
    for label in (*label_map.rename.values(), *label_map.merge):
        if label in config.labels and label not in mentioned:
            raise InputError(
                f"--label-map: the bundle already has the label {label}; add it to the labels that are merged into "
                f"{label}, or choose another name"
            )
    for table in ("split", "category_paths"):
        for label in getattr(label_map, table):
            if label not in members:
                raise InputError(f"--label-map: {table}.{label}: there is no such label after the map")
    for label, split in label_map.split.items():
        taken = [part for part in split.labels if part != label and part in members]
        if taken:
            raise InputError(f"--label-map: split.{label}: {taken[0]} is another label; choose a new name")


def _paths(
    label_map: LabelMap, config: BundleConfig, members: dict[str, list[int]]
) -> tuple[_Path, ...] | None:
    known = config.category_paths
    if known is None:
        if label_map.category_paths:
            raise InputError("--label-map: the bundle has no category paths; leave out category_paths")
        return None
    are_names = all("/".join(path) == label for label, path in zip(config.labels, known, strict=True))

    def path_of(label: str, group: Sequence[int]) -> _Path:
        where = f"--label-map: category path of {label}"
        if label in label_map.category_paths:
            return parse_category_path(label_map.category_paths[label], where)
        for index in group:
            # A label that stays, or whose classes are joined by those of retired ones, keeps its path.
            if config.labels[index] == label:
                return known[index]
        if are_names:
            return parse_category_path(label, where)
        named = [index for index in group if config.labels[index] not in label_map.retire]
        if len(named) == 1:
            *parents, last = known[named[0]]
            return (*parents, label if last == config.labels[named[0]] else last)
        return (*_common_parent([known[index] for index in named]), label)

    return tuple(path_of(label, group) for label, group in members.items())


def _common_parent(paths: Sequence[_Path]) -> _Path:
    """The longest path above all of these paths."""
    parent = []
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        parent.append(parts[0])
    return tuple(parent)


def _calibration(
    calibration: Calibration,
    label_map: LabelMap,
    labels: Sequence[str],
    mapped: BundleConfig,
    members: dict[str, list[int]],
) -> Calibration:
    """The thresholds after the map.

    A merged class has the highest threshold of its classes, and none is accepted if that holds for one of them. A
    retired class does not count, because its replacement keeps its threshold.
    """

    def threshold(group: Sequence[int]) -> float | None:
        named = [index for index in group if labels[index] not in label_map.retire]
        values = [calibration.thresholds[index] for index in named]
        return None if None in values else max(value for value in values if value is not None)

    depths = calibration.depth_thresholds
    if depths is not None and mapped.category_paths is not None:
        depth = max(map(len, mapped.category_paths))
        depths = (*depths[:depth], *(None,) * (depth - len(depths)))
    thresholds = tuple(threshold(group) for group in members.values())
    return calibration.model_copy(update={"thresholds": thresholds, "depth_thresholds": depths})
