"""Agreement of an engine's predictions with those of the same network in fp32.

Letters: N images, K classes, D embedding dimension.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from batchcls.models.engines.engine import EngineOutput, Precision

NO_PREDICTION = -1
"""Stands for the class of an image whose answer is not finite: the main job puts it in quarantine."""

_SHORTEST = 1e-30  # an embedding of zeros has no direction, and none may divide by its length


@dataclass(frozen=True, slots=True)
class AccuracyTolerance:
    """How much of fp32's answers a faster engine has to keep.

    Attributes:
        min_top1_agreement: share in 0..1 of the images whose best class is that of fp32.
        min_embedding_cosine: mean cosine between embeddings and those of fp32, for bf16 and fp16.
        int8_min_agreement: share as above, for int8, which is held to nothing else; None: int8 is
            not chosen on its own.
    """

    min_top1_agreement: float = 0.99
    min_embedding_cosine: float = 0.999
    int8_min_agreement: float | None = None


_CONTRACT_OF_FP32 = AccuracyTolerance()  # its answers may differ by rounding, whatever is asked of the others


@dataclass(frozen=True, slots=True)
class EngineAgreement:
    """Answers to `images` images beside those of fp32.

    Attributes:
        images: how many were compared.
        top1_agreement: share in 0..1 with the same best class; an answer that is not finite has none.
        mean_cosine: of the angle between an embedding and that of fp32, in -1..1; 0 if not finite.
        least_cosine: that of the image that is furthest off.
    """

    images: int
    top1_agreement: float
    mean_cosine: float
    least_cosine: float

    @classmethod
    def between(cls, answer: EngineOutput, reference: EngineOutput) -> Self:
        """Compare the answers to the same N images, N at least 1."""
        cosine = _cosine(answer.embedding, reference.embedding)
        return cls(
            images=len(cosine),
            top1_agreement=top1_agreement(best_class(answer), best_class(reference)),
            mean_cosine=float(cosine.mean()),
            least_cosine=float(cosine.min()),
        )

    def missed(self, contract: AccuracyTolerance, precision: Precision) -> str | None:
        """What of the contract does not hold, with the figure, for people; None if all of it does.

        int8 for which no bound is set misses nothing; whether it may be chosen is another matter.
        """
        if precision == "int8":
            bound = contract.int8_min_agreement
            return None if bound is None else self._too_few(bound)
        contract = _CONTRACT_OF_FP32 if precision == "fp32" else contract
        return self._too_few(contract.min_top1_agreement) or self._too_far(contract.min_embedding_cosine)

    def close_call(self, contract: AccuracyTolerance, precision: Precision) -> str | None:
        """That another sample might as well miss the contract that this one holds, for people; else None.

        Within one standard error of the bound for the best classes; fp32 is never close.
        """
        bound = contract.int8_min_agreement if precision == "int8" else contract.min_top1_agreement
        if precision == "fp32" or bound is None:
            return None
        error = (self.top1_agreement * (1 - self.top1_agreement) / self.images) ** 0.5
        if self.top1_agreement - error >= bound:
            return None
        return (
            f"{self.top1_agreement:.2%} of {self.images} images is within the sampling error of the {bound:.2%} "
            "that are asked for; more --calibration-images tell more"
        )

    def holds(self, contract: AccuracyTolerance, precision: Precision) -> bool:
        """Whether all of the contract holds that is meant for the precision."""
        return self.missed(contract, precision) is None

    def _too_few(self, bound: float) -> str | None:
        # Written so that a NaN, which compares as false, is refused.
        if self.top1_agreement >= bound:
            return None
        return (
            f"{self.top1_agreement:.2%} of the images keep the best class of fp32, {bound:.2%} are asked for"
        )

    def _too_far(self, bound: float) -> str | None:
        if self.mean_cosine >= bound:
            return None
        return f"the cosine of its embeddings with fp32's is {self.mean_cosine:.5f}, {bound:g} is asked for"


def best_class(answer: EngineOutput) -> npt.NDArray[np.int64]:
    """Best class of N images, the first of equals; NO_PREDICTION where logits or embedding are not finite."""
    return np.where(_finite(answer), answer.logits.argmax(axis=1), NO_PREDICTION)


def top1_agreement(best: npt.NDArray[np.integer], reference: npt.NDArray[np.integer]) -> float:
    """Share in 0..1 of N images with the same best class; NO_PREDICTION agrees with nothing."""
    return float(((best == reference) & (best != NO_PREDICTION)).mean())


def is_close_to(answer: EngineOutput, reference: EngineOutput, tolerance: float) -> bool:
    """Whether two engines say the same about N images, up to rounding.

    Args:
        answer: of the one.
        reference: of the other.
        tolerance: by how much a number may differ, in units of the largest of the reference's kind.
    """
    return all(
        bool(np.abs(found - expected).max() <= tolerance * np.abs(expected).max())
        for found, expected in (
            (answer.logits, reference.logits),
            (answer.embedding, reference.embedding),
        )
    )


def _finite(answer: EngineOutput) -> npt.NDArray[np.bool_]:
    return _finite_rows(answer.logits) & _finite_rows(answer.embedding)


def _finite_rows(values: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    finite: npt.NDArray[np.bool_] = np.isfinite(values).all(axis=1)
    return finite


def _cosine(
    embedding: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """N cosines; 1 for two embeddings of zeros, which are the same, 0 where a value is not finite."""
    one, other = embedding.astype(np.float64), reference.astype(np.float64)
    finite = _finite_rows(one) & _finite_rows(other)
    one, other = np.where(finite[:, None], one, 0), np.where(finite[:, None], other, 0)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosine = (one * other).sum(axis=1) / np.maximum(lengths, _SHORTEST)
    both_zero = finite & ~one.any(axis=1) & ~other.any(axis=1)
    return np.where(both_zero, 1.0, cosine)
