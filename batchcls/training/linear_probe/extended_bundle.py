"""Adds categories to a bundle from a few labeled images: its classifier gets new rows, its network stays unchanged.

The embeddings of images of the existing categories place the new rows. They are those that a run has stored, of
which no image is read again, and those of a labeled manifest.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.inference.golden_record import verified_bundle, with_golden
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.image_files import find_images
from batchcls.manifest.labeled_manifest import LabelColumn
from batchcls.manifest.snapshot import Manifest
from batchcls.models.build import build_backbone
from batchcls.models.labels import CategoryPaths, Labels
from batchcls.models.model_bundle import WEIGHTS_FILE, Bundle, Calibration
from batchcls.models.weights import from_safetensors, to_safetensors
from batchcls.schema import IMAGE, ITEM_ID, ROW, URI, URI_FAULT
from batchcls.storage.filesystem import Storage, redact_uri
from batchcls.training.categories import format_names
from batchcls.training.linear_probe.embeddings import (
    EmbeddingSettings,
    ImageEmbeddings,
    embed_images,
    read_rows,
)
from batchcls.training.linear_probe.labeled_embeddings import LinearHead
from batchcls.training.linear_probe.new_rows import NewRows, find_existing, fit_new_rows
from batchcls.training.linear_probe.probe_job import linear_classifier, with_pooled_embedding
from batchcls.training.linear_probe.run_embeddings import read_run_embeddings

_logger = logging.getLogger(__name__)

_MAX_RUN_ROWS = 5000
MAX_EXISTING_ROWS = 50
"""Images of each existing category that are read from a labeled manifest."""

_MAX_NAMED_IMAGES = 3


@dataclass(frozen=True, slots=True)
class LabeledImages:
    """N images with a label.

    Attributes:
        rows: the columns of `FragmentReader`; `row` is 0..N-1.
        labels: their N labels.
        base: folder that relative URIs refer to.
    """

    rows: pa.Table
    labels: tuple[str, ...]
    base: str


def images_of_folders(folders: Mapping[str, str], storage: Storage) -> LabeledImages:
    """List the images in the folder, or the matches of the glob, of each label.

    Raises:
        InputError: a folder does not exist, or has no images.
    """
    uris: list[str] = []
    labels: list[str] = []
    for label, folder in folders.items():
        found = find_images(folder, storage)
        uris += [info.uri for info in found.files]
        labels += [label] * len(found.files)
        base = found.base
    nulls = pa.nulls(len(uris), pa.string())
    rows = pa.table(
        {
            ROW: pa.array(range(len(uris)), pa.int64()),
            ITEM_ID: pa.array(uris, pa.string()),
            URI: pa.array(uris, pa.string()),
            IMAGE: pa.nulls(len(uris), pa.large_binary()),
            "source_version": nulls,
            URI_FAULT: nulls,
        }
    )
    return LabeledImages(rows, tuple(labels), base)


def images_of_manifest(
    manifest: Manifest,
    column: LabelColumn,
    limits: Mapping[str, int | None],
    storage: Storage,
) -> LabeledImages:
    """Read the rows of some labels of a manifest.

    Args:
        manifest: manifest opened with `open_labeled_manifest`.
        column: its labels.
        limits: maximum number of evenly spaced rows of each label; None: all. Other labels are left out.
        storage: storage that holds the manifest.
    """
    chosen = np.zeros(manifest.rows, bool)
    for code, label in enumerate(column.distinct.to_pylist()):
        if label in limits:
            rows = np.flatnonzero(column.codes == code)
            limit = limits[label]
            count = len(rows) if limit is None else min(limit, len(rows))
            chosen[rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]] = True
    tables = list(read_rows(manifest, FragmentReader(manifest.columns, storage), chosen))
    rows = pa.concat_tables(tables).select([ROW, ITEM_ID, URI, IMAGE, "source_version", URI_FAULT])
    labels = column.distinct.take(pa.array(column.codes[rows[ROW].to_numpy()])).to_pylist()
    numbers = pa.array(range(rows.num_rows), pa.int64())
    return LabeledImages(rows.set_column(0, ROW, numbers), tuple(labels), manifest.base)


@dataclass(frozen=True, slots=True)
class ExtensionSettings:
    """How a bundle is extended.

    Attributes:
        embedding: how images are loaded and embedded.
        name: name of the extension, stored in the bundle.
        run: folder of a run of the bundle whose stored embeddings are used; None: no run.
        on_progress: called with the number of embedded images.
    """

    embedding: EmbeddingSettings
    name: str
    run: str | None = None
    on_progress: Callable[[int], object] | None = None


@dataclass(frozen=True, slots=True)
class NewCategory:
    """The images of a new category, and what the new row makes of them.

    Attributes:
        label: name of the category.
        images: number of images that could be read.
        failures: number of the others, by reason.
        held_out: share of the images that were assigned to the category while they were held out; None for one image.
        moved: share of the other images, of the run and of existing categories, that are now assigned to it.
    """

    label: str
    images: int
    failures: dict[str, int]
    held_out: float | None
    moved: float


@dataclass(frozen=True, slots=True)
class ExtendedBundle:
    """A bundle with more categories, and the measurements of each new one."""

    bundle: Bundle
    categories: tuple[NewCategory, ...]


def extend_bundle(
    bundle: Bundle,
    images: LabeledImages,
    new: Labels,
    paths: CategoryPaths | None,
    settings: ExtensionSettings,
    storage: Storage,
) -> ExtendedBundle:
    """Add categories to a bundle.

    Args:
        bundle: bundle with a linear classifier on its pooled embedding.
        images: images of the new categories, and possibly of existing ones.
        new: names of the new categories, in the order of the new outputs.
        paths: category paths of all labels, existing and new; None: the labels have no paths.
        settings: how the bundle is extended.
        storage: storage that holds the run.

    Raises:
        InputError: the classifier is not linear or not trained, a category exists already or has no readable image,
            there are no images of existing categories, or the run cannot be used.
        GoldenMismatch: the outputs of the network differ from the golden outputs of the bundle.
    """
    check_new_labels(bundle, new)
    network = with_pooled_embedding(bundle)
    head = linear_head(network)
    embedded = embed_images(network, images.rows, images.base, settings.embedding, settings.on_progress)
    labels = np.array(images.labels, object)
    is_new = np.isin(labels[embedded.rows], new)
    _require_images(images, embedded, new)
    values = torch.from_numpy(embedded.values)
    positives = [values[torch.from_numpy(labels[embedded.rows] == label)] for label in new]
    existing = values[torch.from_numpy(~is_new)]
    temperature = 1.0 if bundle.config.calibration is None else bundle.config.calibration.temperature
    catalog = existing
    if settings.run is not None:
        stored = _run_values(settings.run, head, embedded, is_new, storage)
        reliable = find_existing(head, positives, stored, temperature)
        _logger.info(
            "%d of %d images of the run resemble the new categories and do not count as existing ones",
            int((~reliable).sum()),
            len(stored),
        )
        catalog, existing = torch.cat([existing, stored]), torch.cat([existing, stored[reliable]])
    if not len(existing):
        raise InputError(
            "there are no images of the existing categories, which show where the new ones end; specify a run of this "
            "bundle with --run OUTPUT, or a --manifest that also has images of existing categories"
        )
    fitted = fit_new_rows(head, positives, existing, temperature)
    failures = [
        Counter(reason for row, reason in embedded.failures.items() if labels[row] == label) for label in new
    ]
    moved = _moved(head, fitted, catalog)
    categories = tuple(
        NewCategory(label, len(rows), dict(failed), share, moved[index])
        for index, (label, rows, failed, share) in enumerate(
            zip(new, positives, failures, fitted.held_out, strict=True)
        )
    )
    lineage = _lineage(bundle, categories, fitted, len(existing), settings)
    return ExtendedBundle(_with_rows(bundle, fitted.head, new, paths, settings.name, lineage), categories)


def check_new_labels(bundle: Bundle, new: Sequence[str]) -> None:
    """Check that categories can be added to a bundle.

    Raises:
        InputError: the bundle has an untrained classifier or one of the categories, or a category is given twice.
    """
    if bundle.config.untrained_head:
        raise InputError("the classifier of the bundle is untrained; train it with `batchcls finetune` first")
    existing = [label for label in new if label in bundle.config.labels]
    if existing:
        raise InputError(
            f"the bundle already has {format_names(existing)}; choose other names, or train the existing categories "
            "with `batchcls finetune`"
        )
    repeated = [label for label, count in Counter(new).items() if count > 1]
    if repeated:
        raise InputError(f"new categories are given more than once: {format_names(repeated)}")


def linear_head(network: Bundle) -> LinearHead:
    """Return the classifier of a network with a pooled embedding. Raises InputError if it has no bias."""
    layer = build_backbone(network).head
    assert isinstance(layer, nn.Linear)
    if layer.bias is None:
        raise InputError(
            f"the head of {network.config.spec} has no bias, which a new category needs; use `batchcls finetune`"
        )
    return LinearHead(layer.weight.detach(), layer.bias.detach())


def _require_images(images: LabeledImages, embedded: ImageEmbeddings, new: Labels) -> None:
    """Raise InputError for a category without a readable image, and log the images that cannot be read."""
    readable = {images.labels[row] for row in embedded.rows.tolist()}
    for label in new:
        failed = [row for row in embedded.failures if images.labels[row] == label]
        names = ", ".join(
            f"{redact_uri(images.rows[URI][row].as_py() or images.rows[ITEM_ID][row].as_py() or f'row {row}')} "
            f"({embedded.failures[row]})"
            for row in failed[:_MAX_NAMED_IMAGES]
        )
        more = f" and {len(failed) - _MAX_NAMED_IMAGES} more" if len(failed) > _MAX_NAMED_IMAGES else ""
        if label not in readable:
            raise InputError(
                f"none of the {images.labels.count(label)} images of {label} can be read: {names}{more}"
            )
        if failed:
            _logger.warning("%s: %d images cannot be read: %s%s", label, len(failed), names, more)


def _run_values(
    uri: str,
    head: LinearHead,
    embedded: ImageEmbeddings,
    is_new: npt.NDArray[np.bool_],
    storage: Storage,
) -> torch.Tensor:
    """Stored embeddings of a run, without those of the images of the new categories."""
    found = read_run_embeddings(uri, head, _MAX_RUN_ROWS, storage)
    new_hashes = {embedded.hashes[index] for index in np.flatnonzero(is_new).tolist()}
    keep = np.array([value not in new_hashes for value in found.hashes], bool)
    if not keep.all():
        _logger.info(
            "run %s has %d of the images of the new categories; they are left out",
            found.run_id,
            (~keep).sum(),
        )
    return torch.from_numpy(found.values[keep])


def _moved(head: LinearHead, fitted: NewRows, catalog: torch.Tensor) -> tuple[float, ...]:
    """For each new category, the share of the images that are assigned to it."""
    logits = torch.cat([head.logits(catalog), fitted.head.logits(catalog)], dim=1)
    counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1])[len(head.bias) :]
    return tuple((counts / len(catalog)).tolist())


def _with_rows(
    bundle: Bundle,
    rows: LinearHead,
    new: Labels,
    paths: CategoryPaths | None,
    name: str,
    lineage: Mapping[str, Any],
) -> Bundle:
    """Append rows to the classifier. All other weights, and the existing rows, are the same bytes as before."""
    config, path = bundle.config, linear_classifier(bundle)
    state = from_safetensors(bundle.weights, WEIGHTS_FILE)
    for parameter, value in (("weight", rows.weight), ("bias", rows.bias)):
        before = state[f"{path}.{parameter}"]
        added = value.reshape(len(new), *before.shape[1:]).to(before.dtype)
        state[f"{path}.{parameter}"] = torch.cat([before, added])
    kind = "random" if config.weights.kind == "random" else "trained"
    extended = bundle.with_weights(
        to_safetensors(state),
        {"kind": kind, "name": name},
        labels=(*config.labels, *new),
        category_paths=paths,
        calibration=_extended_calibration(config.calibration, len(new), paths),
        lineage=dict(lineage),
    )
    return verified_bundle(with_golden(extended))


def _extended_calibration(
    calibration: Calibration | None, new: int, paths: CategoryPaths | None
) -> Calibration | None:
    """Return the calibration with thresholds that accept no prediction of a new category.

    The temperature stays valid, because the new rows are fitted at it. So do the thresholds of the existing
    categories: a new row only reduces their probabilities, so that they accept a subset of the predictions that they
    accepted before.
    """
    if calibration is None:
        return None
    depths = calibration.depth_thresholds
    if depths is not None and paths is not None:
        depths = (*depths, *(None,) * (max(map(len, paths)) - len(depths)))
    return calibration.model_copy(
        update={"thresholds": (*calibration.thresholds, *(None,) * new), "depth_thresholds": depths}
    )


def _lineage(
    bundle: Bundle,
    categories: Sequence[NewCategory],
    fitted: NewRows,
    existing: int,
    settings: ExtensionSettings,
) -> dict[str, Any]:
    return {
        "extended": [
            {
                "label": found.label,
                "images": found.images,
                "failures": found.failures,
                "held_out": found.held_out,
                "moved": found.moved,
            }
            for found in categories
        ],
        "existing_images": existing,
        "run": None if settings.run is None else redact_uri(settings.run),
        "penalty": fitted.strength,
        "start": {
            "fingerprint": bundle.fingerprint,
            "weights": bundle.config.weights.model_dump(mode="json"),
            "lineage": bundle.config.lineage,
        },
        "versions": {name: version(name) for name in ("batchcls", "torch", "timm", "torchvision")},
    }
