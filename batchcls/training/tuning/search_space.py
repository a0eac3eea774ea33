"""The settings that `--tune` searches, and the values of each trial.

Trial 1 has the values of the recipe. The others are points of a scrambled Halton sequence, which covers the space more
evenly than independent random values. The values of a trial depend on the recipe, the seed and the number of the trial,
but not on the number of trials, so that a longer search contains a shorter one.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import qmc

from batchcls.storage.documents import Count, StoredRecord
from batchcls.training.recipe import Recipe

RECIPE_TRIAL = 1
"""Number of the trial with the values of the recipe."""

_MAX_FACTOR = 4.0  # of a learning rate, up and down
_EPOCH_FACTORS = (0.6, 1.0, 1.5)
_CROP_SCALES = (0.2, 0.9)
_MIXUP = (0.0, 0.2, 0.4)
_COLOR_JITTER = (0.0, 0.1, 0.2, 0.4)
_LABEL_SMOOTHING = (0.0, 0.05, 0.1, 0.2)


class TrialValues(StoredRecord):
    """Values of the searched settings, each named as in the recipe.

    Attributes:
        learning_rate: peak learning rate of the body.
        head_learning_rate: peak learning rate of the classifier.
        epochs: number of epochs.
        crop_scale_min: minimum area of the random crop as a fraction of the image, the first value of crop_scale.
        mixup: alpha of MixUp; 0: off.
        color_jitter: maximum change of brightness, contrast and saturation.
        label_smoothing: label smoothing.
    """

    learning_rate: float
    head_learning_rate: float
    epochs: Count
    crop_scale_min: float
    mixup: float
    color_jitter: float
    label_smoothing: float

    @classmethod
    def of(cls, recipe: Recipe) -> "TrialValues":
        """Return the values of a recipe."""
        return cls(
            learning_rate=recipe.learning_rate,
            head_learning_rate=recipe.head_learning_rate,
            epochs=recipe.epochs,
            crop_scale_min=recipe.crop_scale[0],
            mixup=recipe.mixup,
            color_jitter=recipe.color_jitter,
            label_smoothing=recipe.label_smoothing,
        )

    def applied_to(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these values.

        Raises:
            InputError: the values are not compatible with the recipe.
        """
        own = TrialValues.of(recipe)
        changes: dict[str, object] = {
            name: value for name, value in self.model_dump().items() if value != getattr(own, name)
        }
        if "crop_scale_min" in changes:
            changes["crop_scale"] = (changes.pop("crop_scale_min"), recipe.crop_scale[1])
        return recipe.with_changes(**changes) if changes else recipe

    def changes_from(self, other: "TrialValues") -> str:
        """Describe the values that differ from `other`, for example `epochs 15 (10), mixup 0 (0.2)`."""
        return ", ".join(
            f"{name} {value:.3g} ({getattr(other, name):.3g})"
            for name, value in self.model_dump().items()
            if value != getattr(other, name)
        )


def trial_values(recipe: Recipe, trials: int, seed: int, fixed: Sequence[str] = ()) -> list[TrialValues]:
    """Return the values of each trial, starting with those of the recipe.

    Args:
        recipe: recipe of the run, with the changes by flags and the scaled learning rates.
        trials: number of trials, at least 1.
        seed: seed of the run.
        fixed: names of settings that keep the value of the recipe in all trials.
    """
    own = TrialValues.of(recipe)
    points = qmc.Halton(len(TrialValues.model_fields), rng=np.random.default_rng(seed)).random(trials)
    return [own, *(_values_at(point.tolist(), recipe, own, fixed) for point in points[1:])]


def _values_at(point: Sequence[float], recipe: Recipe, own: TrialValues, fixed: Sequence[str]) -> TrialValues:
    """Return the values at a point of the unit cube."""
    rate, head_rate, epochs, crop, mixup, jitter, smoothing = point
    low, high = _CROP_SCALES
    # Rounded as they are shown, so that a recipe with the shown values gives the same result.
    values: dict[str, object] = {
        "learning_rate": _rounded(own.learning_rate * _MAX_FACTOR ** (2 * rate - 1)),
        "head_learning_rate": _rounded(own.head_learning_rate * _MAX_FACTOR ** (2 * head_rate - 1)),
        "epochs": int(_choose([max(1, round(factor * own.epochs)) for factor in _EPOCH_FACTORS], epochs)),
        "crop_scale_min": min(_rounded(low + (high - low) * crop), recipe.crop_scale[1]),
        "mixup": _choose((*_MIXUP, own.mixup), mixup),
        "color_jitter": _choose((*_COLOR_JITTER, own.color_jitter), jitter),
        "label_smoothing": _choose((*_LABEL_SMOOTHING, own.label_smoothing), smoothing),
    }
    return own.model_copy(update={name: value for name, value in values.items() if name not in fixed})


def _choose(options: Sequence[float], share: float) -> float:
    """Return one of the distinct options; `share` is in 0..1."""
    distinct = sorted(set(options))
    return distinct[min(int(share * len(distinct)), len(distinct) - 1)]


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
