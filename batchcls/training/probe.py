"""The recipe `linear-probe`: labelled manifests and a bundle -> a bundle with a head for their categories."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from batchcls.errors import InputError
from batchcls.manifest import Manifest
from batchcls.models.bundle import Bundle
from batchcls.models.labels import CategoryPaths, Labels
from batchcls.storage import Storage
from batchcls.training.categories import Categories, Classes, describe_categories, settle_order
from batchcls.training.embedding_store import EmbeddingStore
from batchcls.training.embeddings import Embedded, EmbeddingSettings, embed
from batchcls.training.examples import Examples, LinearHead
from batchcls.training.labelled import NO_LABEL, UNKNOWN_LABEL, read_labels_of
from batchcls.training.linear import LinearProbe, LinearSettings, train_linear_probe
from batchcls.training.new_head import pooled, with_head
from batchcls.training.noise import Judged, noise_table
from batchcls.training.start import tell_what_ends

_logger = logging.getLogger(__name__)

_TOP = 5


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """All that a linear probe needs beside its inputs.

    Attributes:
        embedding: how images become embeddings; `mirrored` counts for training rows only.
        linear: how the head is fitted.
        name: of the training run, kept in the bundle.
        labels: the categories in their order, from a file; None: see `settle_order`.
        paths: of `labels` in the shop's tree; None: the bundle's, where its labels are kept.
        noise_rows: rows of the label-noise report.
        watch: see `embeddings.embed`; it is called for training and for validation rows.
    """

    embedding: EmbeddingSettings
    linear: LinearSettings = field(default_factory=LinearSettings)
    name: str = "linear-probe"
    labels: Labels | None = None
    paths: CategoryPaths | None = None
    noise_rows: int = 200
    watch: Callable[[EmbeddingStore], object] | None = None


@dataclass(frozen=True, slots=True)
class Probed:
    """What came out.

    Attributes:
        bundle: for `classify`, with golden answers and its lineage.
        categories: in the order of the bundle's labels, with what is odd about them.
        metrics: what the lineage holds, too; JSON values.
        noise: training rows whose label looks wrong, see `noise.NOISE_SCHEMA`.
        probe: the head, and how it was found.
    """

    bundle: Bundle
    categories: Categories
    metrics: dict[str, Any]
    noise: pa.Table
    probe: LinearProbe


def linear_probe_bundle(
    bundle: Bundle,
    train: Manifest,
    validation: Manifest | None,
    settings: ProbeSettings,
    storage: Storage,
) -> Probed:
    """Fit a head for a shop's categories on the frozen network of a bundle.

    Every validation row is counted once: right, wrong (a category that training does not have is
    wrong, too), failed (its image cannot be read) or without a label. No choice is made by them.

    Args:
        bundle: trunk, preprocessing and tap are kept, and its labels where all training labels are among them.
        train: opened with its labels, as `batchcls.manifest.open_labelled` does.
        validation: the same; None: nothing is measured but held-out training rows.
        settings: how.
        storage: how to reach the manifests.

    Raises:
        InputError: labels, images or the network are not fit for it; the message has the remedy.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    started = time.monotonic()
    network = pooled(bundle)
    trained = read_labels_of(train, storage)
    validated = None if validation is None else read_labels_of(validation, storage)
    labels = settle_order(trained, settings.labels, bundle.config.labels)
    tell_what_ends(bundle, labels)
    categories = describe_categories(labels, trained, validated)
    categories.log_notes()
    names = pa.array(labels, pa.string())
    embedded = embed(network, train, settings.embedding, storage, settings.watch)
    examples = Examples.of(embedded.values, embedded.good, trained.classes(names), len(labels))
    _require_some(examples, embedded, "training")
    embedded_seconds = time.monotonic() - started
    probe = train_linear_probe(examples, settings.linear)
    metrics: dict[str, Any] = {
        "training_rows": len(examples),
        "training_failed": embedded.failures,
        "held_out_top1": probe.chosen.top1,
        "held_out_loss": probe.chosen.loss,
        "method": probe.method,
        "shrinkage": probe.chosen.shrinkage,
        "l2": probe.chosen.strength,
        "embedding_seconds": round(embedded_seconds, 1),
        "fit_seconds": round(time.monotonic() - started - embedded_seconds, 1),
    }
    if validation is not None and validated is not None:
        plain = replace(settings.embedding, mirrored=False)
        seen = embed(network, validation, plain, storage, settings.watch)
        metrics["validation"] = measure(probe.head, seen, validated.classes(names))
    judged = Judged.of(_answers(examples, probe))
    noise = noise_table(judged, examples.rows, labels, train, storage, settings.noise_rows)
    metrics["confidently_mislabelled"] = int(judged.confident.sum())
    lineage = _lineage(bundle, train, validation, settings) | {"metrics": metrics}
    paths = settings.paths or bundle.config.paths_of(labels)
    made = with_head(bundle, probe.head, labels, paths, (settings.name, lineage))
    _logger.info("linear probe in %.1f s: %s", time.monotonic() - started, metrics)
    return Probed(made, categories, metrics, noise, probe)


def measure(head: LinearHead, seen: Embedded, classes: Classes) -> dict[str, Any]:
    """Count what a head answers to N rows (first view), a piece at a time.

    Args:
        head: for K categories.
        seen: embeddings of N rows.
        classes: N, as `LabelColumn.classes` gives them.

    Returns:
        Shares `top1` and `top5` of the labelled rows with an embedding, mean cross-entropy `loss` of
        those whose category is known, and the rows of each kind.
    """
    rows = Examples.of(seen.values, seen.good, classes, len(head.bias))
    top1, top5, loss = 0, 0, 0.0
    for embeddings, targets in rows.pieces():
        logits = head.logits(embeddings)
        ranked = logits.topk(min(_TOP, logits.shape[1])).indices == targets[:, None]
        top1, top5 = top1 + int(ranked[:, 0].sum()), top5 + int(ranked.any(1).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    unseen = int(((classes == UNKNOWN_LABEL) & seen.good).sum())
    answered = len(rows) + unseen
    if not len(rows):
        raise InputError(f"no validation row has an embedding and a known category; failed: {seen.failures}")
    return {
        "top1": top1 / answered,
        "top5": top5 / answered,
        "loss": loss / len(rows),
        "rows": len(classes),
        "answered": answered,
        "of_unseen_categories": unseen,
        "failed": seen.failures,
        "without_label": int((classes == NO_LABEL).sum()),
    }


def _require_some(examples: Examples, embedded: Embedded, which: str) -> None:
    if not len(examples):
        raise InputError(
            f"none of the labelled {which} rows has an image that can be read; failed: {embedded.failures}"
        )


def _answers(examples: Examples, probe: LinearProbe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of training rows with their classes: by heads that had not seen them, where there are such."""
    if probe.held_out is not None:
        yield torch.from_numpy(probe.held_out), torch.from_numpy(examples.classes.astype(np.int64))
        return
    for embeddings, classes in examples.pieces():
        yield probe.head.logits(embeddings), classes


def _lineage(
    bundle: Bundle, train: Manifest, validation: Manifest | None, settings: ProbeSettings
) -> dict[str, Any]:
    linear = settings.linear
    return {
        "recipe": "linear-probe",
        "started_from": bundle.fingerprint,
        "training_manifest": train.fingerprint,
        "validation_manifest": None if validation is None else validation.fingerprint,
        "seed": linear.seed,
        "balance": linear.balance,
        "label_smoothing": linear.label_smoothing,
        "mirrored": settings.embedding.mirrored,
        "versions": {name: version(name) for name in ("batchcls", "torch", "timm", "torchvision")},
    }
