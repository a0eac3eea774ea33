"""Finds pairs of copies among fingerprints without comparing every image with every other.

The similarity of two images is the correlation of their thumbnails over all pixels and color channels, so it does not
depend on brightness and contrast; the largest one of all pairs of thumbnails and of mirrored thumbnails counts. As a
distance between vectors of length 1, it can be searched with a k-d tree. The tree has only the leading principal
components, in which no distance is larger than between the whole thumbnails: no pair above the threshold is missed
because of it, and pairs below the threshold are dropped by a second, complete comparison.

Symbols: N images, M of them with different pixels, D values of a thumbnail.
"""

import itertools
import logging
import math
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from batchcls.training.duplicates.fingerprints import Fingerprints

NEAR_SIMILARITY = 0.99
"""Similarity from which images count as near copies (docs/measurements/duplicates.md)."""

_MIN_CONTRAST = (
    4.0  # standard deviation in gray levels; below, a thumbnail is mostly noise of the compression
)
_COMPONENTS = 12  # fewer find more candidates, more take longer to search
_SAMPLE_ROWS = 50_000
_CHUNK_ROWS = 16_384
_MAX_NEIGHBORS = 32

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyPairs:
    """Pairs of copies among N images; every array except `original` has shape (P,).

    Copies with equal pixels are a group, whose first image is their original. An exact pair consists of the original
    and another image of its group, and a near pair of two originals.

    Attributes:
        first: index of the first image of each pair.
        second: index of the second image, larger than `first`.
        similarity: largest correlation of two thumbnails, 1 for exact pairs.
        exact: whether the pixels are equal.
        mirrored: whether the images are more similar if one of them is flipped horizontally.
        original: index of the first image with equal pixels for each of the N images, of shape (N,).
    """

    first: Indices
    second: Indices
    similarity: npt.NDArray[np.float32]
    exact: npt.NDArray[np.bool_]
    mirrored: npt.NDArray[np.bool_]
    original: Indices


def find_copies(
    fingerprints: Fingerprints, threshold: float = NEAR_SIMILARITY, threads: int | None = None
) -> CopyPairs:
    """Find exact and near copies among N images.

    Args:
        fingerprints: fingerprints of the images; an image is the original of later images with equal pixels.
        threshold: minimum similarity of near copies, 0..1.
        threads: number of threads; None: all cores of this process.
    """
    _, first_index, inverse = np.unique(fingerprints["digest"], return_index=True, return_inverse=True)
    original: Indices = first_index[inverse].astype(np.int64)
    copies = np.flatnonzero(original != np.arange(len(fingerprints)))
    rows = np.sort(first_index).astype(np.int64)
    near, similarity, mirrored = _near_pairs(
        fingerprints["thumbnails"], rows, threshold, threads or len(os.sched_getaffinity(0))
    )
    is_exact = np.arange(len(copies) + len(near)) < len(copies)
    return CopyPairs(
        first=np.concatenate([original[copies], near[:, 0]]),
        second=np.concatenate([copies, near[:, 1]]),
        similarity=np.concatenate([np.ones(len(copies), np.float32), similarity]),
        exact=is_exact,
        mirrored=np.concatenate([np.zeros(len(copies), np.bool_), mirrored]),
        original=original,
    )


def thumbnail_vectors(thumbnails: npt.NDArray[np.uint8], *, mirrored: bool = False) -> Vectors:
    """Return vectors of length 1 (n x D) whose dot product is the correlation; zeros for images without contrast.

    Args:
        thumbnails: uint8 array of shape (n, S, S, 3).
        mirrored: whether the images are flipped horizontally.
    """
    flipped = thumbnails[:, :, ::-1] if mirrored else thumbnails
    values = flipped.reshape(len(thumbnails), math.prod(thumbnails.shape[1:])).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    has_contrast = lengths > _MIN_CONTRAST * np.sqrt(values.shape[1])
    vectors: Vectors = np.where(has_contrast, values / np.maximum(lengths, 1e-6), 0).astype(np.float32)
    return vectors


def _near_pairs(
    thumbnails: npt.NDArray[np.uint8], rows: Indices, threshold: float, threads: int
) -> tuple[Indices, npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return pairs (P x 2, ascending) of `rows` above the threshold, their similarity, and whether they are mirrored.

    Every view of every image, and its mirror image, is compared with the whole of every other image.
    """
    nothing = np.empty((0, 2), np.int64), np.empty(0, np.float32), np.empty(0, np.bool_)
    whole = thumbnails[:, 0]
    if not len(rows):
        return nothing
    basis = _principal_components(whole, rows)
    projected = np.concatenate([thumbnail_vectors(whole[chunk]) @ basis for chunk in _chunks(rows)])
    searchable = np.flatnonzero(projected.any(axis=1))
    rows = rows[searchable]
    if len(rows) < 2:
        return nothing
    tree = cKDTree(projected[searchable])
    # Rounding must not exclude a pair at the threshold, so the search is slightly wider than the comparison.
    radius = float(np.sqrt(2 * (1 - threshold))) + 1e-4
    pairs, similarities, mirrors, crowded = [], [], [], 0
    for positions in _chunks(np.arange(len(rows))):
        for view, is_mirrored in itertools.product(range(thumbnails.shape[1]), (False, True)):
            vectors = thumbnail_vectors(thumbnails[rows[positions], view], mirrored=is_mirrored)
            queries, found, saturated = _neighbors(tree, vectors @ basis, radius, threads)
            crowded += saturated
            similarity = _correlation(vectors, queries, whole, rows[found])
            is_near = (similarity >= threshold) & (positions[queries] != found)
            pairs.append(np.sort(rows[np.column_stack([positions[queries], found])[is_near]], axis=1))
            similarities.append(similarity[is_near])
            mirrors.append(np.full(int(is_near.sum()), is_mirrored))
    if crowded:
        _logger.warning(
            "%d times, an image has more than %d candidates for near copies; the closest ones are compared",
            crowded,
            _MAX_NEIGHBORS,
        )
    return _most_similar(np.concatenate(pairs), np.concatenate(similarities), np.concatenate(mirrors))


def _neighbors(tree: cKDTree, points: Vectors, radius: float, threads: int) -> tuple[Indices, Indices, int]:
    """Return pairs of a point and a position in the tree within the radius, and the number of points with too many."""
    count = min(_MAX_NEIGHBORS + 1, tree.n)  # a point also finds itself
    distances, neighbors = tree.query(points, k=count, distance_upper_bound=radius, workers=threads)
    is_found = np.isfinite(distances)
    saturated = int(is_found[:, -1].sum()) if count < tree.n else 0
    queries = np.broadcast_to(np.arange(len(points))[:, None], neighbors.shape)
    return queries[is_found], neighbors[is_found], saturated


def _correlation(
    vectors: Vectors, queries: Indices, whole: npt.NDArray[np.uint8], rows: Indices
) -> npt.NDArray[np.float32]:
    """Return the correlation of the vector of each query with the thumbnail of the row at the same position."""
    found = [np.empty(0, np.float32)]
    for chunk in _chunks(np.arange(len(queries))):
        others = thumbnail_vectors(whole[rows[chunk]])
        correlation = np.einsum("nd,nd->n", vectors[queries[chunk]], others)
        found.append(np.minimum(correlation, 1, dtype=np.float32))
    return np.concatenate(found)


def _most_similar(
    pairs: Indices, similarity: npt.NDArray[np.float32], mirrored: npt.NDArray[np.bool_]
) -> tuple[Indices, npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Keep each pair once, in the orientation in which it is most similar."""
    order = np.lexsort((mirrored, -similarity, pairs[:, 1], pairs[:, 0]))
    ordered = pairs[order]
    is_first = np.ones(len(ordered), np.bool_)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return ordered[is_first], similarity[order][is_first], mirrored[order][is_first]


def _principal_components(thumbnails: npt.NDArray[np.uint8], rows: Indices) -> Vectors:
    """Return orthonormal directions (D x components) with the largest mean square of the vectors."""
    chosen = rows
    if len(rows) > _SAMPLE_ROWS:
        chosen = np.sort(np.random.default_rng(0).choice(rows, _SAMPLE_ROWS, replace=False))
    sample = thumbnail_vectors(thumbnails[chosen])
    # Around the mean, because a common background does not distinguish images.
    centered = sample - sample.mean(axis=0)
    _, directions = np.linalg.eigh(centered.T.astype(np.float64) @ centered)
    basis: Vectors = directions[:, : -_COMPONENTS - 1 : -1].astype(np.float32)
    return basis


def _chunks(rows: Indices) -> list[Indices]:
    return [rows[start : start + _CHUNK_ROWS] for start in range(0, len(rows), _CHUNK_ROWS)]
