"""Golden answers: what a bundle's network says about a few drawn images, kept in its record.

Whoever is going to work with the bundle asks the running network again and compares. Labels that
were swapped, another mean or size, a channel order that was turned round, another tap, an engine
that loses too much: all of them answer otherwise.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from batchcls.errors import GoldenMismatch
from batchcls.models.labels import labels_digest

Floats = npt.NDArray[np.float32]

TOP = 5


class GoldenPrediction(BaseModel):
    """What the network says about one drawn image, in float32 on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: tuple[str, ...] = Field(description="The best labels, the best first; five where there are.")
    class_indices: tuple[int, ...] = Field(description="Their class indices.")
    probabilities: tuple[float, ...] = Field(description="Their probabilities in 0..1.")
    embedding: str = Field(description="The embedding: little-endian float32, base64.")


class Golden(BaseModel):
    """The answers to all drawn images."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    drawing: int = Field(description="Version of the drawn images.")
    labels_sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="Digest of all labels in order, so that none is swapped unseen.",
    )
    answers: tuple[GoldenPrediction, ...] = Field(
        min_length=2, description="One an image, in the drawing's order."
    )


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an engine may be from the golden answers.

    `probability` bounds the change of any of the kept probabilities. `distance` bounds how far an
    embedding moves, in units of how far the embeddings of different images are from their mean.
    `cosine` is the least between an embedding and the golden one.
    """

    probability: float
    distance: float
    cosine: float = -1.0


# Measured: docs/measurements, "Golden answers". A lower precision alone moves an embedding as far as some
# wrong preprocessings do, so whoever starts an engine tests the network in fp32 before.
TOLERANCES = {
    "fp32": Tolerance(probability=0.01, distance=0.02),
    "bf16": Tolerance(probability=0.15, distance=0.35),
    "fp16": Tolerance(probability=0.08, distance=0.15),
    # Scales are chosen by the catalog's images, and drawings may lie outside of them: here only a network
    # that is broken is found. What int8 costs is measured on the catalog's own images.
    "int8": Tolerance(probability=1.0, distance=float("inf"), cosine=0.9),
}


@dataclass(frozen=True, slots=True)
class Deviation:
    """The largest differences found between an engine and the golden answers; see `Tolerance`."""

    probability: float
    distance: float
    cosine: float


def create_golden(probabilities: Floats, embedding: Floats, labels: Sequence[str], drawing: int) -> Golden:
    """Golden answers from N x K probabilities and N x D embeddings of the drawn images."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    answers = tuple(
        GoldenPrediction(
            labels=tuple(labels[index] for index in indices),
            class_indices=tuple(map(int, indices)),
            probabilities=tuple(round(float(row[index]), 6) for index in indices),
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode(),
        )
        for row, vector, indices in zip(probabilities, embedding, best, strict=True)
    )
    return Golden(drawing=drawing, labels_sha256=labels_digest(labels), answers=answers)


def check_golden(
    golden: Golden, probabilities: Floats, embedding: Floats, labels: Sequence[str], precision: str
) -> Deviation:
    """Compare N x K probabilities and N x D embeddings of the drawn images with the golden answers.

    Returns:
        How far off they are, within the precision's tolerance.

    Raises:
        GoldenMismatch: something is not as it was when the bundle was made; the message says what.
    """
    expected = np.stack([_embedding(answer) for answer in golden.answers])
    if embedding.shape != expected.shape:
        raise GoldenMismatch(
            f"embeddings have {embedding.shape[1]} values, the golden ones {expected.shape[1]}: another tap"
        )
    _require_labels(golden, labels)
    found = Deviation(
        _largest_change(golden, probabilities), _distance(embedding, expected), _cosine(embedding, expected)
    )
    allowed = TOLERANCES[precision]
    # Written so that a NaN, which compares as false, is refused.
    if not (
        found.probability <= allowed.probability
        and found.distance <= allowed.distance
        and found.cosine >= allowed.cosine
    ):
        raise GoldenMismatch(
            f"the network does not answer the drawn images as it did when the bundle was made (in {precision}: "
            f"probabilities off by {found.probability:.3f}, {allowed.probability:g} allowed; embeddings off by "
            f"{found.distance:.3f} of their spread, {allowed.distance:g} allowed; least cosine "
            f"{found.cosine:.3f}, {allowed.cosine:g} asked for)"
        )
    return found


def _require_labels(golden: Golden, labels: Sequence[str]) -> None:
    for number, answer in enumerate(golden.answers):
        now = tuple(labels[index] for index in answer.class_indices if index < len(labels))
        if now != answer.labels:
            raise GoldenMismatch(
                f"drawn image {number}: classes {answer.class_indices} were called {answer.labels} and are "
                f"called {now} now: the labels were swapped or renamed"
            )
    if labels_digest(labels) != golden.labels_sha256:
        raise GoldenMismatch("the labels are not those that the bundle was made with, or in another order")


def _largest_change(golden: Golden, probabilities: Floats) -> float:
    changes = [
        np.abs(row[list(answer.class_indices)] - np.array(answer.probabilities)).max()
        for answer, row in zip(golden.answers, probabilities, strict=True)
    ]
    return float(np.max(changes))


def _distance(embedding: Floats, expected: Floats) -> float:
    """Largest move of an embedding in units of the spread of the expected ones."""
    spread = np.linalg.norm(expected - expected.mean(axis=0), axis=1).mean()
    return float(np.linalg.norm(embedding - expected, axis=1).max() / max(float(spread), 1e-30))


def _cosine(embedding: Floats, expected: Floats) -> float:
    """The least of an embedding with the expected one; 0 where one of them has no length."""
    lengths = np.linalg.norm(embedding, axis=1) * np.linalg.norm(expected, axis=1)
    products: Floats = (embedding * expected).sum(axis=1)
    return float((products / np.maximum(lengths, 1e-30)).min())


def _embedding(answer: GoldenPrediction) -> Floats:
    return np.frombuffer(base64.b64decode(answer.embedding), "<f4").astype(np.float32)
