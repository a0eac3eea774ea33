"""Chooses the crop of the images for a training run from its training images.

The crop of published weights is that of a benchmark, and may cut off what distinguishes the categories of another
catalog. The candidates keep the number of pixels of the input, and so the cost of a prediction. Each one is
cross-validated on training images: a linear classifier is fitted to embeddings of the initial network, and evaluated
on images that it was not fitted to. Validation rows are never used.

The candidate with the lowest cross-entropy is chosen, with two exceptions. The crop of the weights is kept if the
candidate is not better than it by more than the standard error of the difference. And if the network itself is trained,
the rectangle is chosen unless it is worse than the crop of the weights by more than this error: it shows whole images
without a loss of resolution, and a network that was trained on squares rates it too low, which training changes.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from batchcls.config.finetune_config import LINEAR_PROBE, FinetuneConfig
from batchcls.images.load_config import decode_limits, fetch_policy
from batchcls.inference.golden_record import with_golden
from batchcls.manifest.labeled_manifest import LabelColumn
from batchcls.manifest.snapshot import Manifest
from batchcls.models.feature_taps import ImageSizeError
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing
from batchcls.schema import ROW
from batchcls.storage.documents import Count, Document, DocumentError, StoredRecord
from batchcls.storage.filesystem import Storage, explain, join
from batchcls.training.initial_bundle import TrainingExamples
from batchcls.training.linear_probe.embeddings import EmbeddingSettings, ImageEmbeddings, embed_images
from batchcls.training.linear_probe.extended_bundle import LabeledImages, images_of_manifest
from batchcls.training.linear_probe.labeled_embeddings import LabeledEmbeddings
from batchcls.training.linear_probe.logistic import Objective, fit_logistic

CROP_FILE = "crop.json"
"""File of the work directory with the choice, so that a resumed run has the same crop."""

_MAX_IMAGES = 1024
_MIN_IMAGES = 200
_MIN_ROWS_PER_CATEGORY = 5
# Of this process: its time does not depend on the other processes of the machine, so that the sample does not either.
_MAX_CPU_SECONDS = 600.0
_TIMED_IMAGES = 128
_FOLDS = 5
_PENALTY = 0.03
# Sides of a rectangle are multiples of half the stride of almost every network, and its area differs by at most this
# factor.
_SIDE_STEP = 16
_MAX_AREA_FACTOR = 1.15
_MIN_ASPECT = 1.1  # a rectangle that is closer to a square is one

_logger = logging.getLogger(__name__)


class CropScore(StoredRecord):
    """The cross-validation of one crop on the sampled training images.

    Attributes:
        name: name of the crop in the log.
        preprocessing: preprocessing with this crop.
        top1: top-1 accuracy on held-out images, 0..1.
        loss: mean cross-entropy of held-out images.
        visible: mean fraction of the image that the network sees, 0..1.
        gain: mean cross-entropy with the crop of the weights minus `loss`; larger is better.
        gain_error: standard error of `gain`, from the differences of all images.
    """

    name: str
    preprocessing: Preprocessing
    top1: float
    loss: float
    visible: float
    gain: float
    gain_error: float

    def __str__(self) -> str:
        difference = (
            "" if self.gain_error == 0 else f" ({-self.gain:+.3f} \N{PLUS-MINUS SIGN} {self.gain_error:.3f})"
        )
        return (
            f"{self.name}: {self.visible:.0%} of an image visible, {self.top1:.1%} of held-out images correct, loss "
            f"{self.loss:.3f}{difference}"
        )


class CropChoice(Document):
    """crop.json of a work directory.

    Attributes:
        key: digest of what the choice depends on: weights, training manifest and categories.
        images: number of sampled training images.
        chosen: preprocessing with the chosen crop.
        scores: the candidates; the first one is the crop of the weights.
    """

    format: Literal["batchcls-crop"] = "batchcls-crop"
    key: str
    images: Count
    chosen: Preprocessing
    scores: tuple[CropScore, ...]


def with_chosen_crop(
    config: FinetuneConfig,
    bundle: Bundle,
    opened: Bundle | None,
    examples: TrainingExamples,
    storage: Storage,
) -> tuple[Bundle, CropChoice | None]:
    """Return the bundle with the crop that `--crop` determines, and the choice if one was made.

    Networks without trained weights, and bundles of which training keeps a category, keep their crop.

    Args:
        config: settings of the command.
        bundle: initial bundle of the training run.
        opened: the bundle named by --model; None if --model names an architecture.
        examples: training images.
        storage: storage that holds the training images and the work directory.
    """
    if config.crop == "weights" or config.from_scratch:
        return bundle, None
    known = () if opened is None or opened.config.untrained_head else opened.config.labels
    if set(known) & set(examples.labels.distinct.to_pylist()):
        return bundle, None
    settings = EmbeddingSettings(
        fetch_policy(config), decode_limits(config), threads=len(os.sched_getaffinity(0))
    )
    record, trains_network = join(config.work_folder, CROP_FILE), config.recipe != LINEAR_PROBE
    choice = choose_crop(bundle, examples, settings, record, storage, trains_network=trains_network)
    return (bundle if choice is None else with_preprocessing(bundle, choice.chosen)), choice


def with_preprocessing(bundle: Bundle, preprocessing: Preprocessing) -> Bundle:
    """Return the bundle with another preprocessing, without golden outputs."""
    return Bundle(
        bundle.config.model_copy(update={"preprocessing": preprocessing, "golden": None}), bundle.weights
    )


def choose_crop(
    bundle: Bundle,
    examples: TrainingExamples,
    settings: EmbeddingSettings,
    record: str,
    storage: Storage,
    *,
    trains_network: bool = True,
) -> CropChoice | None:
    """Choose the crop by the cross-entropy on held-out training images; see the module.

    Args:
        bundle: initial network; its classifier is not used.
        examples: training images.
        settings: how images are loaded and embedded.
        record: URI of the record of the choice. A record of the same network and manifest is used again.
        storage: storage that holds the manifest and the record.
        trains_network: whether all layers are trained with the crop, and not only a classifier.

    Returns:
        The choice, or None if the sample is too small or the network too slow to choose; the log contains the reason.

    Raises:
        InputError: the network cannot be run.
    """
    manifest, column = examples.manifest, examples.labels
    text = "\0".join((bundle.fingerprint, manifest.fingerprint, manifest.base, str(trains_network)))
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    known = _read(record, storage)
    if known is not None and known.key == key:
        _logger.info("crop: as chosen before: %s", _describe(known.chosen))
        return known
    images = _sample(manifest, column, storage)
    if len(images.labels) < _MIN_IMAGES:
        _logger.info(
            "crop: that of the weights; %d images of categories with at least %d images are too few to compare crops",
            len(images.labels),
            _MIN_ROWS_PER_CATEGORY,
        )
        return None
    own = bundle.config.preprocessing
    times = []
    timed = _first(images, _TIMED_IMAGES)
    sizes = embed_images(
        with_golden(with_preprocessing(bundle, own)),
        timed.rows,
        timed.base,
        settings,
        lambda done: times.append((time.process_time(), done)),
    ).sizes
    (first_time, first_done), (last_time, last_done) = times[0], times[-1]
    seconds_per_image = (last_time - first_time) / (last_done - first_done)
    candidates = _candidates(own, sizes)
    affordable = int(_MAX_CPU_SECONDS / seconds_per_image / len(candidates))
    if affordable < min(_MIN_IMAGES, len(images.labels)):
        _logger.info(
            "crop: that of the weights; an image takes %.1f CPU seconds here, which is too slow to compare crops; to "
            "choose one, pass --crop-pct 1, or --crop-mode border with --input-size HEIGHTxWIDTH",
            seconds_per_image,
        )
        return None
    images = _first(images, affordable)
    _logger.info("comparing %d crops on %d training images", len(candidates), len(images.labels))
    scores, losses = [], []
    for name, preprocessing in candidates.items():
        try:
            network = with_golden(with_preprocessing(bundle, preprocessing))
            embedded = embed_images(network, images.rows, images.base, settings)
        except ImageSizeError as error:
            _logger.info("crop %s: not supported by the network (%s)", name, error.reason)
            continue
        row_losses, is_correct = _cross_validate(embedded, images.labels)
        losses.append(row_losses)
        gain, gain_error = _difference(losses[0], row_losses)
        scores.append(
            CropScore(
                name=name,
                preprocessing=preprocessing,
                top1=float(is_correct.mean()),
                loss=float(row_losses.mean()),
                visible=_visible(preprocessing, sizes),
                gain=gain,
                gain_error=gain_error,
            )
        )
        _logger.info("crop %s", scores[-1])
    chosen = _select(scores, trains_network=trains_network)
    _logger.info("crop: %s; --crop weights keeps that of the weights", _describe(chosen.preprocessing))
    choice = CropChoice(key=key, images=len(images.labels), chosen=chosen.preprocessing, scores=tuple(scores))
    with explain(record):
        storage.write_atomic(record, choice.to_json())
    return choice


def _select(scores: Sequence[CropScore], *, trains_network: bool) -> CropScore:
    """Select a candidate; see the module. The first one is the crop of the weights, the last one may be a rectangle."""
    best, last = min(scores, key=lambda score: score.loss), scores[-1]
    if best.gain <= best.gain_error:
        return scores[0]
    is_rectangle = last.preprocessing.input_height != last.preprocessing.input_width
    return last if trains_network and is_rectangle and last.gain >= -last.gain_error else best


def _difference(losses: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Return the mean of `losses - other`, two losses of the same images, and its standard error."""
    differences = losses - other
    return float(differences.mean()), float(differences.std() / math.sqrt(len(differences)))


def _visible(preprocessing: Preprocessing, sizes: npt.NDArray[np.int32]) -> float:
    """Return the mean fraction of images of these sizes, of shape (N, 2), that is inside the crop."""
    if preprocessing.crop_mode == "squash":
        kept = np.array([preprocessing.input_height, preprocessing.input_width]) / (
            preprocessing.resize_height,
            preprocessing.resize_width,
        )
        return float(kept.prod())
    ratios = sizes / (preprocessing.resize_height, preprocessing.resize_width)
    ratio = ratios.max(1) if preprocessing.crop_mode == "border" else ratios.min(1)
    crop = ratio[:, None] * (preprocessing.input_height, preprocessing.input_width)
    return float(np.minimum(1, crop / sizes).prod(1).mean())


def _read(record: str, storage: Storage) -> CropChoice | None:
    """Read the record of an earlier choice; None if there is none, or it is damaged."""
    with explain(record):
        try:
            return CropChoice.from_json(storage.read_bytes(record))
        except (FileNotFoundError, DocumentError):
            return None


def _describe(preprocessing: Preprocessing) -> str:
    size = f"{preprocessing.input_height} x {preprocessing.input_width}"
    if preprocessing.crop_mode == "squash":
        return f"images are stretched to {size} pixels"
    if preprocessing.crop_mode == "border":
        return f"whole images, padded to {size} pixels"
    if preprocessing.resize_height == preprocessing.input_height:
        return f"the center of {size} pixels, whose short side is that of the image"
    share = preprocessing.input_height / preprocessing.resize_height
    return f"the center of {size} pixels, {share:.1%} of the short side of the image"


def _sample(manifest: Manifest, column: LabelColumn, storage: Storage) -> LabeledImages:
    """Sample evenly spaced training images in random order, of categories in proportion to their sizes."""
    sizes = {
        label: int(size)
        for label, size in zip(
            column.distinct.to_pylist(), np.bincount(column.codes[column.codes >= 0]), strict=True
        )
        if size >= _MIN_ROWS_PER_CATEGORY
    }
    random = np.random.default_rng(0)
    # With thousands of categories, a few images of each would not be enough to fit a classifier.
    names = [str(name) for name in random.permutation(sorted(sizes))][: _MAX_IMAGES // _MIN_ROWS_PER_CATEGORY]
    total = sum(sizes[name] for name in names)
    limits: Mapping[str, int | None] = {
        name: max(_MIN_ROWS_PER_CATEGORY, round(_MAX_IMAGES * sizes[name] / total)) for name in names
    }
    images = images_of_manifest(manifest, column, limits, storage)
    return _take(images, random.permutation(len(images.labels)))


def _first(images: LabeledImages, count: int) -> LabeledImages:
    return _take(images, np.arange(min(count, len(images.labels))))


def _take(images: LabeledImages, indices: npt.NDArray[np.int64]) -> LabeledImages:
    rows = images.rows.take(indices)
    numbers = pa.array(range(len(indices)), pa.int64())
    labels = tuple(images.labels[index] for index in indices)
    return LabeledImages(rows.set_column(rows.schema.get_field_index(ROW), ROW, numbers), labels, images.base)


def _candidates(own: Preprocessing, sizes: npt.NDArray[np.int32]) -> dict[str, Preprocessing]:
    """Return the crops to compare by name: that of the weights first, and others with as many pixels.

    Args:
        own: preprocessing of the weights.
        sizes: height and width of some images, of shape (N, 2).
    """
    whole = own.model_copy(update={"resize_height": own.input_height, "resize_width": own.input_width})
    height, width = _rectangle(own.input_height * own.input_width, np.median(sizes[:, 0] / sizes[:, 1]))
    rectangle = {
        "input_height": height,
        "input_width": width,
        "resize_height": height,
        "resize_width": width,
        "crop_mode": "border",
    }
    found = {
        "of the weights": own,
        "whole center": whole.model_copy(update={"crop_mode": "center"}),
        "stretched": whole.model_copy(update={"crop_mode": "squash"}),
        "padded": whole.model_copy(update={"crop_mode": "border"}),
        f"padded to {height} x {width}": own.model_copy(update=rectangle),
    }
    # Equal candidates are compared once, under their first name.
    distinct = {preprocessing: name for name, preprocessing in reversed(found.items())}
    return {name: preprocessing for name, preprocessing in found.items() if distinct[preprocessing] == name}


def _rectangle(area: int, aspect: float) -> tuple[int, int]:
    """Return height and width of the rectangle of about this area whose height / width is closest to `aspect`."""
    side = math.sqrt(area)
    if max(aspect, 1 / aspect) < _MIN_ASPECT:
        return round(side), round(side)
    sides = range(_SIDE_STEP, 2 * math.ceil(side) + _SIDE_STEP, _SIDE_STEP)
    pairs = [
        (height, width)
        for height in sides
        for width in sides
        if 1 / _MAX_AREA_FACTOR <= height * width / area <= _MAX_AREA_FACTOR
    ]
    if not pairs:
        return round(side), round(side)
    return min(
        pairs, key=lambda pair: (abs(math.log(pair[0] / pair[1] / aspect)), abs(pair[0] * pair[1] - area))
    )


def _cross_validate(
    embedded: ImageEmbeddings, labels: tuple[str, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return the cross-entropy and the correctness of each held-out image, in the order of the images."""
    names, classes = np.unique(np.array(labels, object)[embedded.rows].astype(str), return_inverse=True)
    examples = LabeledEmbeddings(
        embedded.values[None], np.arange(len(classes)), classes.astype(np.int32), len(names)
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        fitted = fit_logistic(examples, Objective(_PENALTY, 0.0, None, 0), _FOLDS)
        assert fitted.held_out is not None
        held_out = torch.from_numpy(fitted.held_out)
        was_held_out = ~held_out.isnan().any(1)
        logits, targets = held_out[was_held_out], torch.from_numpy(classes)[was_held_out]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses.numpy(), (logits.argmax(1) == targets).numpy()
