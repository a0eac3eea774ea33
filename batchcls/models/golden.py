"""Golden outputs: the outputs of a bundle's network for a few synthetic images, stored in the bundle's record.

Every job that uses the bundle runs its engine on the same images and compares. The comparison detects swapped labels,
another mean, size, channel order or embedding tap, and an engine that is not accurate enough.
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


class GoldenOutput(BaseModel):
    """The prediction for one golden image, in float32 on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: tuple[str, ...] = Field(description="The top five labels, or all if there are fewer, best first.")
    class_indices: tuple[int, ...] = Field(description="Class indices of the labels.")
    probabilities: tuple[float, ...] = Field(description="Probabilities of the labels, in 0..1.")
    embedding: str = Field(description="The embedding: little-endian float32, base64.")


class Golden(BaseModel):
    """The predictions for all golden images."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True)

    drawing: int = Field(description="Version of the golden images.")
    labels_sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="Digest of all labels in order, which detects swapped labels.",
    )
    # The stored key is part of the fingerprint of existing bundles.
    outputs: tuple[GoldenOutput, ...] = Field(
        alias="answers", min_length=2, description="Outputs for each golden image, in order."
    )


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest permitted differences between an engine and the golden outputs.

    Attributes:
        probability: largest difference of a recorded probability.
        distance: largest Euclidean distance between an embedding and the golden one, relative to the mean distance
            of the golden embeddings from their centroid.
        cosine: smallest cosine similarity between an embedding and the golden one.
    """

    probability: float
    distance: float
    cosine: float = -1.0


# Measured; see docs/measurements/golden-tests.md. A lower precision moves an embedding as far as some wrong
# preprocessing does, so the network is tested in fp32 before an engine of lower precision is started.
TOLERANCES = {
    "fp32": Tolerance(probability=0.01, distance=0.02),
    "bf16": Tolerance(probability=0.15, distance=0.35),
    "fp16": Tolerance(probability=0.08, distance=0.15),
    # The int8 scales are computed from images of the catalog, and the golden images may be outside of their range.
    # So the test detects only a broken network; the accuracy of int8 is measured on images of the catalog.
    "int8": Tolerance(probability=1.0, distance=float("inf"), cosine=0.9),
}


@dataclass(frozen=True, slots=True)
class Deviation:
    """The largest differences between an engine and the golden outputs; see `Tolerance`."""

    probability: float
    distance: float
    cosine: float


def create_golden(probabilities: Floats, embedding: Floats, labels: Sequence[str], drawing: int) -> Golden:
    """Create golden outputs from N x K probabilities and N x D embeddings of the golden images."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]
    outputs = tuple(
        GoldenOutput(
            labels=tuple(labels[index] for index in indices),
            class_indices=tuple(map(int, indices)),
            probabilities=tuple(round(float(row[index]), 6) for index in indices),
            embedding=base64.b64encode(vector.astype("<f4").tobytes()).decode(),
        )
        for row, vector, indices in zip(probabilities, embedding, best, strict=True)
    )
    return Golden(drawing=drawing, labels_sha256=labels_digest(labels), answers=outputs)


def check_golden(
    golden: Golden, probabilities: Floats, embedding: Floats, labels: Sequence[str], precision: str
) -> Deviation:
    """Compare N x K probabilities and N x D embeddings of the golden images with the golden outputs.

    Returns:
        The differences, which are within the tolerance of the precision.

    Raises:
        GoldenMismatch: labels, probabilities or embeddings differ from the golden outputs; the message says which.
    """
    expected = np.stack([_decode_embedding(output) for output in golden.outputs])
    if embedding.shape != expected.shape:
        raise GoldenMismatch(
            f"embeddings have {embedding.shape[1]} values instead of {expected.shape[1]}: the embedding tap differs"
        )
    _check_labels(golden, labels)
    deviation = Deviation(
        _max_probability_difference(golden, probabilities),
        _max_relative_distance(embedding, expected),
        _min_cosine(embedding, expected),
    )
    tolerance = TOLERANCES[precision]
    # Negated, so that NaN, for which every comparison is false, is a mismatch.
    if not (
        deviation.probability <= tolerance.probability
        and deviation.distance <= tolerance.distance
        and deviation.cosine >= tolerance.cosine
    ):
        raise GoldenMismatch(
            f"the outputs for the golden images differ from those recorded in the bundle (in {precision}: "
            f"probabilities by {deviation.probability:.3f}, tolerance {tolerance.probability:g}; embeddings by "
            f"{deviation.distance:.3f} of their spread, tolerance {tolerance.distance:g}; smallest cosine "
            f"{deviation.cosine:.3f}, tolerance {tolerance.cosine:g})"
        )
    return deviation


def _check_labels(golden: Golden, labels: Sequence[str]) -> None:
    for number, output in enumerate(golden.outputs):
        current = tuple(labels[index] for index in output.class_indices if index < len(labels))
        if current != output.labels:
            raise GoldenMismatch(
                f"golden image {number}: the labels of classes {output.class_indices} were {output.labels} "
                f"and are now {current}: the labels were swapped or renamed"
            )
    if labels_digest(labels) != golden.labels_sha256:
        raise GoldenMismatch("the labels or their order differ from those that the bundle was created with")


def _max_probability_difference(golden: Golden, probabilities: Floats) -> float:
    differences = [
        np.abs(row[list(output.class_indices)] - np.array(output.probabilities)).max()
        for output, row in zip(golden.outputs, probabilities, strict=True)
    ]
    return float(np.max(differences))


def _max_relative_distance(embedding: Floats, expected: Floats) -> float:
    """Return the largest distance between an embedding and the expected one, relative to the spread of the latter."""
    spread = np.linalg.norm(expected - expected.mean(axis=0), axis=1).mean()
    return float(np.linalg.norm(embedding - expected, axis=1).max() / max(float(spread), 1e-30))


def _min_cosine(embedding: Floats, expected: Floats) -> float:
    """Return the smallest cosine similarity to the expected embedding; 0 if one of them is zero."""
    norms = np.linalg.norm(embedding, axis=1) * np.linalg.norm(expected, axis=1)
    products: Floats = (embedding * expected).sum(axis=1)
    return float((products / np.maximum(norms, 1e-30)).min())


def _decode_embedding(prediction: GoldenOutput) -> Floats:
    return np.frombuffer(base64.b64decode(prediction.embedding), "<f4").astype(np.float32)
