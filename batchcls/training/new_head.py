"""A bundle's network under a linear head that was found on its embeddings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.inference.reference import proven, with_golden
from batchcls.models.backbone import Backbone
from batchcls.models.build import build_backbone, build_model
from batchcls.models.bundle import WEIGHTS_FILE, Bundle
from batchcls.models.labels import CategoryPaths, Labels
from batchcls.models.sources import library_of
from batchcls.models.weights import from_safetensors, load_strictly, to_safetensors
from batchcls.training.examples import LinearHead

POOLED = "pooled"


def pooled(bundle: Bundle) -> Bundle:
    """The same network, its embedding taken where its head reads: what a head can be fitted on.

    Raises:
        InputError: the network's head is not one linear layer on one embedding, or the bundle does
            not hold together.
    """
    library, config = library_of(bundle.config.spec), bundle.config
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
    config, library = bundle.config, library_of(bundle.config.spec)
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
    found = proven(with_golden(made))
    _require_same(found, head)
    return found


def _classifier(bundle: Bundle) -> str:
    """The path of the one linear layer that reads the embedding. Raises InputError if there is none."""
    library = library_of(bundle.config.spec)
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
