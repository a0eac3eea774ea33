"""Answers that are not sure enough lose their label; what can be said above it stays."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.inference.taxonomy import Floats, Level, deepest, levels_of
from batchcls.models.labels import CategoryPaths
from batchcls.models.model_bundle import BundleConfig


@dataclass(frozen=True)
class Abstention:
    """When to abstain.

    Attributes:
        thresholds: for each of K classes the least probability, infinity for never.
        depth_thresholds: for each depth of the paths, in the same way.
        paths: of the K classes in the tree of categories; None where the bundle has none.
    """

    thresholds: tuple[float, ...]
    depth_thresholds: tuple[float, ...]
    paths: CategoryPaths | None

    @classmethod
    def of(cls, config: BundleConfig) -> "Abstention":
        """What a bundle says.

        Raises:
            InputError: nobody has calibrated it.
        """
        calibration = config.calibration
        if calibration is None:
            raise InputError(
                "--abstain: the bundle has no thresholds; make one that has with `python -m batchcls.jobs.evaluate "
                "--model BUNDLE --manifest LABELED --write-bundle NEW_BUNDLE`, and classify with that"
            )
        depths = calibration.depth_thresholds
        paths = None if depths is None else config.category_paths
        return cls(_numbers(calibration.thresholds), _numbers(depths or ()), paths)

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return () if self.paths is None else levels_of(self.paths)

    @cached_property
    def _full_paths(self) -> pa.Array:
        return pa.array(["/".join(path) for path in self.paths or ()], pa.string())

    def columns(self, columns: Mapping[str, pa.Array], probabilities: Floats) -> dict[str, pa.Array]:
        """The columns of `TopK` with null for the label of an answer that is not sure enough.

        A column `category_path` comes with them: of a sure answer the whole path of its label, of
        another one the deepest node that is sure enough, null where there is none or no tree.

        Args:
            columns: of N rows.
            probabilities: N x K.
        """
        best = probabilities.argmax(axis=1)
        limits = np.array(self.thresholds, np.float32)[best]
        sure = pa.array(columns["probability"].to_numpy() >= limits)
        label = pc.if_else(sure, columns["label"], pa.scalar(None, pa.string()))
        return {**columns, "label": label, "category_path": self._category_paths(probabilities, best, sure)}

    def _category_paths(self, probabilities: Floats, best: npt.NDArray[np.intp], sure: pa.Array) -> pa.Array:
        if self.paths is None or len(best) == 0:
            return pa.nulls(len(best), pa.string())
        level, node = deepest([one.masses(probabilities) for one in self._levels], self.depth_thresholds)
        above = [
            None if depth < 0 else self._levels[depth].names[number]
            for depth, number in zip(level.tolist(), node.tolist(), strict=True)
        ]
        return pc.if_else(sure, self._full_paths.take(pa.array(best)), pa.array(above, pa.string()))


def _numbers(thresholds: tuple[float | None, ...]) -> tuple[float, ...]:
    return tuple(float("inf") if value is None else value for value in thresholds)
