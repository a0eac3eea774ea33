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
from batchcls.manifest.labeled_manifest import UNKNOWN_CLASS, UNLABELED_CLASS, read_label_column
from batchcls.manifest.snapshot import Manifest
from batchcls.models.backbone import Backbone
from batchcls.models.build import build_backbone, build_model
from batchcls.models.labels import CategoryPaths, Labels
from batchcls.models.model_bundle import WEIGHTS_FILE, Bundle
from batchcls.models.sources import get_library
from batchcls.models.weights import from_safetensors, load_strictly, to_safetensors
from batchcls.storage.filesystem import Storage
from batchcls.training.categories import Categories, Classes, describe_categories, settle_order
from batchcls.training.initial_bundle import tell_what_ends
from batchcls.training.linear_probe.embedding_store import EmbeddingStore
from batchcls.training.linear_probe.embeddings import Embedded, EmbeddingSettings, embed
from batchcls.training.linear_probe.fit import LinearProbe, LinearSettings, train_linear_probe
from batchcls.training.linear_probe.label_noise import LabelNoise, noise_table
from batchcls.training.linear_probe.labeled_embeddings import Examples, LinearHead

POOLED = "pooled"


def pooled(bundle: Bundle) -> Bundle:
    """The same network, its embedding taken where its head reads: what a head can be fitted on.

    Raises:
        InputError: the network's head is not one linear layer on one embedding, or the bundle does
            not hold together.
    """
    library, config = get_library(bundle.config.spec), bundle.config
    if config.embedding_tap != POOLED:
        probed = config.model_copy(update={"embedding_tap": POOLED, "golden": None})
        model = build_model(bundle)
        size = (config.preprocessing.input_height, config.preprocessing.input_width)
        backbone = Backbone(model, library.classifiers(model), size)
        bundle = Bundle(probed.model_copy(update={"embedding_dimension": backbone.dimension}), bundle.weights)
        bundle = with_golden(bundle)
    _classifier(bundle)
    return bundle


def with_head(
    bundle: Bundle,
    head: LinearHead,
    labels: Labels,
    paths: CategoryPaths | None,
    origin: tuple[str, Mapping[str, Any]],
) -> Bundle:
    """The bundle with another head; trunk, preprocessing and tap stay, and the calibration is dropped.

    Args:
        bundle: whose embedding at the pooled tap `head` was fitted on, whatever its own tap is.
        head: K x D.
        labels: K names, in the order of the head's rows.
        paths: for each label its path in the shop's tree; None: they have none.
        origin: name of the training run, and the lineage to be kept.

    Returns:
        A bundle with golden answers of its own.

    Raises:
        InputError: the network's head is not one linear layer on one embedding.
    """
    config, library = bundle.config, get_library(bundle.config.spec)
    path = _classifier(bundle)
    model = library.build(config.spec, len(labels), config.dropout)
    expected = model.state_dict()
    state = from_safetensors(bundle.weights, WEIGHTS_FILE)
    for name, value in (("weight", head.weight), ("bias", head.bias)):
        key = f"{path}.{name}"
        if key not in expected:
            raise InputError(
                f"the head of {config.spec} has no {name}, which a linear probe needs; fine-tune it"
            )
        state[key] = value.reshape(expected[key].shape).to(expected[key].dtype).contiguous()
    load_strictly(model, state, f"the new head of {config.spec}")
    weights = to_safetensors(model.state_dict())
    name, lineage = origin
    made = bundle.with_weights(
        weights,
        {"kind": "trained", "name": name},
        labels=labels,
        category_paths=paths,
        untrained_head=False,
        lineage=dict(lineage),
    )
    found = verified_bundle(with_golden(made))
    _require_same(found, head)
    return found


def _classifier(bundle: Bundle) -> str:
    """The path of the one linear layer that reads the embedding. Raises InputError if there is none."""
    library = get_library(bundle.config.spec)
    paths = library.classifiers(build_model(bundle))
    backbone = build_backbone(bundle)
    if (
        len(paths) != 1
        or not isinstance(backbone.head, nn.Linear)
        or not isinstance(backbone.pool, nn.Identity)
    ):
        raise InputError(
            f"the head of {bundle.config.spec} is not one linear layer on its embedding, so that a linear probe "
            "cannot replace it; train it with --recipe fine-tune"
        )
    return paths[0]


def _require_same(bundle: Bundle, head: LinearHead) -> None:
    """The network that comes out reads its embedding with exactly this head."""
    config = bundle.config.model_copy(
        update={"embedding_tap": POOLED, "embedding_dimension": head.weight.shape[1]}
    )
    layer = build_backbone(replace(bundle, config=config)).head
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer.weight, head.weight)
    assert torch.equal(layer.bias, head.bias)


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
        train: opened with its labels, as `batchcls.manifest.labeled_manifest.open_labeled_manifest` does.
        validation: the same; None: nothing is measured but held-out training rows.
        settings: how.
        storage: how to reach the manifests.

    Raises:
        InputError: labels, images or the network are not fit for it; the message has the remedy.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    started = time.monotonic()
    network = pooled(bundle)
    trained = read_label_column(train, storage)
    validated = None if validation is None else read_label_column(validation, storage)
    for which, column in (("training", trained), ("validation", validated)):
        if column is not None:
            _logger.info("%s: %s", which, column.describe())
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
    judged = LabelNoise.of(_answers(examples, probe))
    noise = noise_table(judged, examples.rows, labels, train, storage, settings.noise_rows)
    metrics["confidently_mislabeled"] = int(judged.confident.sum())
    lineage = _lineage(bundle, train, validation, settings) | {"metrics": metrics}
    paths = settings.paths or bundle.config.category_paths_for(labels)
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
        Shares `top1` and `top5` of the labeled rows with an embedding, mean cross-entropy `loss` of
        those whose category is known, and the rows of each kind.
    """
    rows = Examples.of(seen.values, seen.good, classes, len(head.bias))
    top1, top5, loss = 0, 0, 0.0
    for embeddings, targets in rows.pieces():
        logits = head.logits(embeddings)
        ranked = logits.topk(min(_TOP, logits.shape[1])).indices == targets[:, None]
        top1, top5 = top1 + int(ranked[:, 0].sum()), top5 + int(ranked.any(1).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    unseen = int(((classes == UNKNOWN_CLASS) & seen.good).sum())
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
        "without_label": int((classes == UNLABELED_CLASS).sum()),
    }


def _require_some(examples: Examples, embedded: Embedded, which: str) -> None:
    if not len(examples):
        raise InputError(
            f"none of the labeled {which} rows has an image that can be read; failed: {embedded.failures}"
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
