"""Agreement of an engine's outputs with those of the same network in fp32.

Letters: N images, K classes, D embedding dimension.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from batchcls.models.engines.engine import EngineOutput, Precision

NO_PREDICTION = -1
"""Class index of an image whose outputs are not finite; `classify` quarantines such rows."""

_EPSILON = 1e-30  # avoids division by the zero length of an embedding of zeros


@dataclass(frozen=True, slots=True)
class AccuracyTolerance:
    """How far the outputs of a faster engine may differ from those of fp32.

    Attributes:
        min_top1_agreement: share in 0..1 of the images with the same best class as in fp32.
        min_embedding_cosine: mean cosine between embeddings and those of fp32, for bf16 and fp16.
        int8_min_agreement: as `min_top1_agreement`, and the only limit for int8. None: int8 is not selected
            automatically.
    """

    min_top1_agreement: float = 0.99
    min_embedding_cosine: float = 0.999
    int8_min_agreement: float | None = None


_FP32_TOLERANCE = (
    AccuracyTolerance()
)  # another fp32 engine differs by rounding, whatever tolerance is requested


@dataclass(frozen=True, slots=True)
class EngineAgreement:
    """Agreement of an engine with fp32 on the same images.

    Attributes:
        images: number of images.
        top1_agreement: share in 0..1 with the same best class; outputs that are not finite agree with nothing.
        mean_cosine: mean cosine between an embedding and that of fp32, in -1..1; 0 if not finite.
        min_cosine: smallest of these cosines.
    """

    images: int
    top1_agreement: float
    mean_cosine: float
    min_cosine: float

    @classmethod
    def between(cls, output: EngineOutput, reference: EngineOutput) -> Self:
        """Compare the outputs for the same N images, N at least 1."""
        cosine = _cosine(output.embedding, reference.embedding)
        return cls(
            images=len(cosine),
            top1_agreement=top1_agreement(best_classes(output), best_classes(reference)),
            mean_cosine=float(cosine.mean()),
            min_cosine=float(cosine.min()),
        )

    def violation(self, tolerance: AccuracyTolerance, precision: Precision) -> str | None:
        """Return a human-readable description of the first limit that is violated; None if there is none.

        int8 without a limit violates nothing; whether it may be selected is decided elsewhere.
        """
        if precision == "int8":
            limit = tolerance.int8_min_agreement
            return None if limit is None else self._top1_violation(limit)
        tolerance = _FP32_TOLERANCE if precision == "fp32" else tolerance
        return self._top1_violation(tolerance.min_top1_agreement) or self._cosine_violation(
            tolerance.min_embedding_cosine
        )

    def sampling_warning(self, tolerance: AccuracyTolerance, precision: Precision) -> str | None:
        """Return a warning if the top-1 agreement is within one standard error of its limit, else None.

        Another sample might violate the tolerance in that case. There is no warning for fp32.
        """
        limit = tolerance.int8_min_agreement if precision == "int8" else tolerance.min_top1_agreement
        if precision == "fp32" or limit is None:
            return None
        standard_error = (self.top1_agreement * (1 - self.top1_agreement) / self.images) ** 0.5
        if self.top1_agreement - standard_error >= limit:
            return None
        return (
            f"top-1 agreement of {self.top1_agreement:.2%} on {self.images} images is within the sampling error of "
            f"the required {limit:.2%}; increase --calibration-images for a reliable estimate"
        )

    def satisfies(self, tolerance: AccuracyTolerance, precision: Precision) -> bool:
        """Return whether all limits of the tolerance that apply to the precision are met."""
        return self.violation(tolerance, precision) is None

    def _top1_violation(self, limit: float) -> str | None:
        # In this form, NaN is a violation, because it compares as false.
        if self.top1_agreement >= limit:
            return None
        return f"top-1 agreement with fp32 is {self.top1_agreement:.2%}, below the required {limit:.2%}"

    def _cosine_violation(self, limit: float) -> str | None:
        if self.mean_cosine >= limit:
            return None
        return f"mean embedding cosine with fp32 is {self.mean_cosine:.5f}, below the required {limit:g}"


def best_classes(output: EngineOutput) -> npt.NDArray[np.int64]:
    """Return the best class of N images, the lowest index of equal ones; NO_PREDICTION where outputs are not finite."""
    return np.where(_is_finite(output), output.logits.argmax(axis=1), NO_PREDICTION)


def top1_agreement(best: npt.NDArray[np.integer], reference: npt.NDArray[np.integer]) -> float:
    """Return the share in 0..1 of N images with the same best class; NO_PREDICTION agrees with nothing."""
    return float(((best == reference) & (best != NO_PREDICTION)).mean())


def outputs_close(output: EngineOutput, reference: EngineOutput, tolerance: float) -> bool:
    """Return whether the outputs of two engines for N images are equal up to rounding.

    Args:
        output: output of one engine.
        reference: output of the other engine.
        tolerance: maximum absolute difference, relative to the largest absolute logit or embedding value of the
            reference.
    """
    return all(
        bool(np.abs(actual - expected).max() <= tolerance * np.abs(expected).max())
        for actual, expected in (
            (output.logits, reference.logits),
            (output.embedding, reference.embedding),
        )
    )


def _is_finite(output: EngineOutput) -> npt.NDArray[np.bool_]:
    return _finite_rows(output.logits) & _finite_rows(output.embedding)


def _finite_rows(values: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_] = np.isfinite(values).all(axis=1)
    return finite


def _cosine(
    embedding: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return N cosines; 1 for two embeddings of zeros, which are equal, and 0 where a value is not finite."""
    a, b = embedding.astype(np.float64), reference.astype(np.float64)
    finite = _finite_rows(a) & _finite_rows(b)
    a, b = np.where(finite[:, None], a, 0), np.where(finite[:, None], b, 0)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.maximum(lengths, _EPSILON)
    both_zero = finite & ~a.any(axis=1) & ~b.any(axis=1)
    return np.where(both_zero, 1.0, cosine)
