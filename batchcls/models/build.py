"""Builds the network of a bundle."""

from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.feature_taps import find_tap
from batchcls.models.heads import mark_trainable
from batchcls.models.model_bundle import CONFIG_FILE, WEIGHTS_FILE, Bundle
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import from_safetensors, load_strictly


def build_model(bundle: Bundle) -> nn.Module:
    """Build the bundle's network with its weights, as its library defines it.

    Parameters that the bundle does not list as trainable are frozen.

    Raises:
        InputError: the installed library does not have the architecture, or the weights do not fit.
    """
    config = bundle.config
    spec = find_model(str(config.spec), config.arguments)
    model = get_library(spec).build(spec, len(config.labels), config.dropout)
    load_strictly(model, from_safetensors(bundle.weights, WEIGHTS_FILE), WEIGHTS_FILE)
    mark_trainable(model, config.trainable)
    return model


def build_backbone(bundle: Bundle) -> Backbone:
    """Build the bundle's network with its weights as a backbone, which returns logits and embedding.

    Raises:
        InputError: the installed library does not have the architecture, or weights, labels or embedding do not fit
            it.
    """
    config = bundle.config
    spec = config.spec
    library = get_library(spec)
    model = build_model(bundle)
    size = (config.preprocessing.input_height, config.preprocessing.input_width)
    tap = find_tap(spec, model, library, config.embedding_tap, size)
    backbone = Backbone(model, library.classifiers(model), size, tap)
    if backbone.dimension != config.embedding_dimension:
        raise InputError(
            f"the embedding of {spec} has {backbone.dimension} values, but {CONFIG_FILE} specifies "
            f"{config.embedding_dimension}; create the bundle again"
        )
    return backbone
