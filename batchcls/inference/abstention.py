"""Abstention: predictions below their threshold lose their label but keep a less specific category."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.inference.taxonomy import Floats, TaxonomyLevel, deepest_nodes, taxonomy_levels
from batchcls.models.labels import CategoryPaths
from batchcls.models.model_bundle import BundleConfig


@dataclass(frozen=True)
class Abstention:
    """Thresholds below which predictions have no label.

    Attributes:
        thresholds: minimum probability of each of K classes; infinity for a class that is never predicted.
        depth_thresholds: minimum summed probability of a node at each depth of the category tree.
        paths: paths of the K classes in the category tree; None if the bundle has none.
    """

    thresholds: tuple[float, ...]
    depth_thresholds: tuple[float, ...]
    paths: CategoryPaths | None

    @classmethod
    def from_bundle(cls, config: BundleConfig) -> "Abstention":
        """Create an abstention from the calibration of a bundle.

        Raises:
            InputError: the bundle is not calibrated.
        """
        calibration = config.calibration
        if calibration is None:
            raise InputError(
                "--abstain: the bundle has no thresholds; create a bundle with thresholds with "
                "`batchcls evaluate --model BUNDLE --manifest LABELED --write-bundle NEW_BUNDLE`, and "
                "classify with it"
            )
        depths = calibration.depth_thresholds
        paths = None if depths is None else config.category_paths
        return cls(_with_infinity(calibration.thresholds), _with_infinity(depths or ()), paths)

    @cached_property
    def _levels(self) -> tuple[TaxonomyLevel, ...]:
        return () if self.paths is None else taxonomy_levels(self.paths)

    @cached_property
    def _full_paths(self) -> pa.Array:
        return pa.array(["/".join(path) for path in self.paths or ()], pa.string())

    def apply(self, columns: Mapping[str, pa.Array], probabilities: Floats) -> dict[str, pa.Array]:
        """Return the columns with a null label below the threshold, and with a column `category_path`.

        The category path is the full path of the class where the label is kept, and elsewhere the deepest node whose
        summed probability reaches its threshold. It is null if no node does, or without a category tree.

        Args:
            columns: columns of `TopK` for N rows.
            probabilities: N x K.
        """
        best = probabilities.argmax(axis=1)
        limits = np.array(self.thresholds, np.float32)[best]
        is_confident = pa.array(columns["probability"].to_numpy() >= limits)
        label = pc.if_else(is_confident, columns["label"], pa.scalar(None, pa.string()))
        return {
            **columns,
            "label": label,
            "category_path": self._category_paths(probabilities, best, is_confident),
        }

    def _category_paths(
        self, probabilities: Floats, best: npt.NDArray[np.intp], is_confident: pa.Array
    ) -> pa.Array:
        if self.paths is None or len(best) == 0:
            return pa.nulls(len(best), pa.string())
        depths, nodes = deepest_nodes(
            [level.node_probabilities(probabilities) for level in self._levels], self.depth_thresholds
        )
        ancestors = [
            None if depth < 0 else self._levels[depth].names[node]
            for depth, node in zip(depths.tolist(), nodes.tolist(), strict=True)
        ]
        return pc.if_else(
            is_confident, self._full_paths.take(pa.array(best)), pa.array(ancestors, pa.string())
        )


def _with_infinity(thresholds: tuple[float | None, ...]) -> tuple[float, ...]:
    return tuple(float("inf") if value is None else value for value in thresholds)
