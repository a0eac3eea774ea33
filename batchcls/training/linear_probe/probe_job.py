"""Implements the recipe `linear-probe`, which trains a new head on the frozen embeddings of a bundle."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.inference.golden_record import verified_bundle, with_golden
from batchcls.manifest.labeled_manifest import (
    UNKNOWN_CLASS,
    UNLABELED_CLASS,
    LabelColumn,
    read_label_column,
)
from batchcls.manifest.snapshot import Manifest
from batchcls.models.backbone import Backbone
from batchcls.models.build import build_backbone, build_model
from batchcls.models.labels import CategoryPaths, Labels
from batchcls.models.model_bundle import WEIGHTS_FILE, Bundle
from batchcls.models.sources import get_library
from batchcls.models.weights import from_safetensors, load_strictly, to_safetensors
from batchcls.storage.filesystem import Storage
from batchcls.training.categories import (
    Categories,
    Classes,
    complete_category_paths,
    describe_categories,
    resolve_category_order,
    warn_about_dropped_metadata,
)
from batchcls.training.duplicates.duplicate_report import (
    DuplicateReport,
    LeakPolicy,
    SplitImages,
    kept_rows,
    report_duplicates,
)
from batchcls.training.linear_probe.embedding_store import EmbeddingStore
from batchcls.training.linear_probe.embeddings import EmbeddingSettings, ManifestEmbeddings, embed
from batchcls.training.linear_probe.fit import LinearProbe, LinearSettings, train_linear_probe
from batchcls.training.linear_probe.label_noise import LabelNoise, noise_table
from batchcls.training.linear_probe.labeled_embeddings import LabeledEmbeddings, LinearHead

POOLED = "pooled"


def with_pooled_embedding(bundle: Bundle) -> Bundle:
    """Return the same network with its embedding at the tap `pooled`, the input of its head.

    Raises:
        InputError: the head of the network is not a single linear layer on one embedding, or the bundle is invalid.
    """
    library, config = get_library(bundle.config.spec), bundle.config
    if config.embedding_tap != POOLED:
        pooled_config = config.model_copy(update={"embedding_tap": POOLED, "golden": None})
        model = build_model(bundle)
        size = (config.preprocessing.input_height, config.preprocessing.input_width)
        backbone = Backbone(model, library.classifiers(model), size)
        bundle = Bundle(
            pooled_config.model_copy(update={"embedding_dimension": backbone.dimension}), bundle.weights
        )
        bundle = with_golden(bundle)
    linear_classifier(bundle)
    return bundle


def replace_head(
    bundle: Bundle,
    head: LinearHead,
    labels: Labels,
    paths: CategoryPaths | None,
    name: str,
    lineage: Mapping[str, Any],
) -> Bundle:
    """Return the bundle with another head. The calibration is dropped; everything else is kept.

    Args:
        bundle: bundle on whose pooled embeddings `head` was fitted; its own tap may be another one.
        head: head for K categories.
        labels: names of the K categories, in the order of the rows of the head.
        paths: paths of the labels in the category tree; None: the labels have no paths.
        name: name of the training run.
        lineage: lineage of the new bundle.

    Returns:
        The new bundle with its own golden outputs.

    Raises:
        InputError: the head of the network is not a single linear layer on one embedding.
    """
    config, library = bundle.config, get_library(bundle.config.spec)
    path = linear_classifier(bundle)
    model = library.build(config.spec, len(labels), config.dropout)
    expected = model.state_dict()
    state = from_safetensors(bundle.weights, WEIGHTS_FILE)
    for parameter, value in (("weight", head.weight), ("bias", head.bias)):
        key = f"{path}.{parameter}"
        if key not in expected:
            raise InputError(
                f"the head of {config.spec} has no {parameter}, which a linear probe needs; use --recipe fine-tune"
            )
        state[key] = value.reshape(expected[key].shape).to(expected[key].dtype).contiguous()
    load_strictly(model, state, f"the new head of {config.spec}")
    weights = to_safetensors(model.state_dict())
    trained = bundle.with_weights(
        weights,
        {"kind": "trained", "name": name},
        labels=labels,
        category_paths=paths,
        untrained_head=False,
        lineage=dict(lineage),
    )
    verified = verified_bundle(with_golden(trained))
    _require_same(verified, head)
    return verified


def linear_classifier(bundle: Bundle) -> str:
    """Return the path of the linear layer that reads the embedding. Raises InputError if there is none."""
    library = get_library(bundle.config.spec)
    paths = library.classifiers(build_model(bundle))
    backbone = build_backbone(bundle)
    if (
        len(paths) != 1
        or not isinstance(backbone.head, nn.Linear)
        or not isinstance(backbone.pool, nn.Identity)
    ):
        raise InputError(
            f"the head of {bundle.config.spec} is not one linear layer on its embedding, so that its rows cannot be "
            "fitted on embeddings; use `finetune --recipe fine-tune`"
        )
    return paths[0]


def _require_same(bundle: Bundle, head: LinearHead) -> None:
    """Assert that the bundle contains exactly this head."""
    config = bundle.config.model_copy(
        update={"embedding_tap": POOLED, "embedding_dimension": head.weight.shape[1]}
    )
    layer = build_backbone(replace(bundle, config=config)).head
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, head.weight)
    assert torch.equal(layer.bias, head.bias)


_logger = logging.getLogger(__name__)

_TOP_K = 5


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """Settings of a linear probe.

    Attributes:
        embedding: how embeddings are computed; `mirrored` applies to training rows only.
        linear: how the head is fitted.
        name: name of the training run, stored in the bundle.
        labels: the categories in order, from a file; None: see `resolve_category_order`.
        paths: paths of `labels` in the category tree; None: see `complete_category_paths`.
        max_noise_rows: maximum number of rows of the label noise report.
        on_open: see `embeddings.embed`; called for training and for validation rows.
        work_dir: folder of the report of copies of images; None: no report.
        leaks: whether training rows that are also in validation are left out; needs `work_dir`.
    """

    embedding: EmbeddingSettings
    linear: LinearSettings = field(default_factory=LinearSettings)
    name: str = "linear-probe"
    labels: Labels | None = None
    paths: CategoryPaths | None = None
    max_noise_rows: int = 200
    on_open: Callable[[EmbeddingStore], object] | None = None
    work_dir: str | None = None
    leaks: LeakPolicy = "report"


@dataclass(frozen=True, slots=True)
class LinearProbeResult:
    """Result of a linear probe.

    Attributes:
        bundle: the bundle for `classify`, with golden outputs and lineage.
        categories: the categories in the order of the labels of the bundle, with warnings.
        metrics: metrics as JSON values; also part of the lineage.
        noise: training rows whose label is likely wrong, see `label_noise.NOISE_SCHEMA`.
        probe: the head, and how it was fitted.
        duplicates: copies of images; None without a report.
    """

    bundle: Bundle
    categories: Categories
    metrics: dict[str, Any]
    noise: pa.Table
    probe: LinearProbe
    duplicates: DuplicateReport | None = None


def linear_probe_bundle(
    bundle: Bundle,
    train: Manifest,
    validation: Manifest | None,
    settings: ProbeSettings,
    storage: Storage,
) -> LinearProbeResult:
    """Fit a head for the categories of a manifest on the frozen network of a bundle.

    Every validation row is counted once: as correct, as wrong (also if training does not have its category), as failed
    (its image cannot be read) or as unlabeled. Validation rows do not influence the head.

    Args:
        bundle: frozen network. Its labels are kept if they contain all training labels.
        train: training manifest, opened with `batchcls.manifest.labeled_manifest.open_labeled_manifest`.
        validation: validation manifest, opened in the same way; None: only held-out training rows are evaluated.
        settings: settings of the linear probe.
        storage: storage that holds the manifests.

    Raises:
        InputError: labels, images or the network cannot be used; the message names the remedy.
        GoldenMismatch: the outputs of the network differ from the golden outputs of the bundle.
    """
    started = time.monotonic()
    network = with_pooled_embedding(bundle)
    trained = read_label_column(train, storage)
    validated = None if validation is None else read_label_column(validation, storage)
    for name, column in (("training", trained), ("validation", validated)):
        if column is not None:
            _logger.info("%s: %s", name, column.describe())
    labels = resolve_category_order(trained, settings.labels, bundle.config.labels)
    warn_about_dropped_metadata(bundle, labels)
    categories = describe_categories(labels, trained, validated)
    categories.log_warnings()
    names = pa.array(labels, pa.string())
    embedded = embed(network, train, settings.embedding, storage, settings.on_open)
    examples = LabeledEmbeddings.of(embedded.values, embedded.good, trained.classes(names), len(labels))
    _require_examples(examples, embedded, "training")
    held_out, duplicates = None, None
    if validation is not None and validated is not None:
        plain = replace(settings.embedding, mirrored=False)
        held_out = embed(network, validation, plain, storage, settings.on_open)
        if settings.work_dir is not None:
            duplicates = report_duplicates(
                _split_images(train, trained, embedded),
                _split_images(validation, validated, held_out),
                settings.work_dir,
                settings.leaks,
                storage,
            )
            if settings.leaks == "remove":
                examples = examples.where(
                    kept_rows(examples.rows, examples.classes, duplicates.leaked, labels)
                )
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
    if held_out is not None and validated is not None:
        metrics["validation"] = evaluate_head(probe.head, held_out, validated.classes(names))
    if duplicates is not None:
        metrics["duplicates"] = duplicates.counts
    label_noise = LabelNoise.of(_training_logits(examples, probe))
    noise = noise_table(label_noise, examples.rows, labels, train, storage, settings.max_noise_rows)
    metrics["confidently_mislabeled"] = int(label_noise.confident.sum())
    lineage = _lineage(bundle, train, validation, settings) | {"metrics": metrics}
    paths = settings.paths or complete_category_paths(bundle.config, labels)
    new_bundle = replace_head(bundle, probe.head, labels, paths, settings.name, lineage)
    _logger.info(
        "linear probe: %s on %d images, top-1 accuracy %.2f %% on held-out ones; embeddings in %.1f s, fit in %.1f s; "
        "images that failed: %s",
        probe.method,
        len(examples),
        100 * probe.chosen.top1,
        metrics["embedding_seconds"],
        metrics["fit_seconds"],
        _describe_failures(embedded),
    )
    return LinearProbeResult(new_bundle, categories, metrics, noise, probe, duplicates)


def _split_images(manifest: Manifest, column: LabelColumn, embedded: ManifestEmbeddings) -> SplitImages:
    rows = np.flatnonzero(embedded.good & (column.codes != UNLABELED_CLASS))
    return SplitImages(manifest, rows, embedded.fingerprints[rows])


def evaluate_head(head: LinearHead, embeddings: ManifestEmbeddings, classes: Classes) -> dict[str, Any]:
    """Evaluate a head on the first view of N rows, in chunks.

    Args:
        head: head for K categories.
        embeddings: embeddings of N rows.
        classes: class indices of shape (N,), see `LabelColumn.classes`.

    Returns:
        Accuracies `top1` and `top5` of the labeled rows with an embedding, mean cross-entropy `loss` of the rows
        whose category is known, and the number of rows of each kind.

    Raises:
        InputError: no row has an embedding and a known category.
    """
    rows = LabeledEmbeddings.of(embeddings.values, embeddings.good, classes, len(head.bias))
    top1, top5, loss = 0, 0, 0.0
    for chunk, targets in rows.chunks():
        logits = head.logits(chunk)
        ranked = logits.topk(min(_TOP_K, logits.shape[1])).indices == targets[:, None]
        top1, top5 = top1 + int(ranked[:, 0].sum()), top5 + int(ranked.any(1).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    unknown = int(((classes == UNKNOWN_CLASS) & embeddings.good).sum())
    evaluated = len(rows) + unknown
    if not len(rows):
        raise InputError(
            "no validation row has a readable image and a known category; images that failed: "
            f"{_describe_failures(embeddings)}"
        )
    return {
        "top1": top1 / evaluated,
        "top5": top5 / evaluated,
        "loss": loss / len(rows),
        "rows": len(classes),
        "predicted": evaluated,
        "of_unseen_categories": unknown,
        "failed": embeddings.failures,
        "without_label": int((classes == UNLABELED_CLASS).sum()),
    }


def _describe_failures(embedded: ManifestEmbeddings) -> str:
    return ", ".join(f"{reason}={count}" for reason, count in embedded.failures.items()) or "none"


def _require_examples(examples: LabeledEmbeddings, embedded: ManifestEmbeddings, name: str) -> None:
    if not len(examples):
        raise InputError(
            f"none of the labeled {name} rows has an image that can be read; images that failed: "
            f"{_describe_failures(embedded)}"
        )


def _training_logits(
    examples: LabeledEmbeddings, probe: LinearProbe
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits and classes of the training rows, out-of-fold logits if available."""
    if probe.held_out is not None:
        yield torch.from_numpy(probe.held_out), torch.from_numpy(examples.classes.astype(np.int64))
        return
    for embeddings, classes in examples.chunks():
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
        "leaks": settings.leaks,
        "versions": {name: version(name) for name in ("batchcls", "torch", "timm", "torchvision")},
    }
