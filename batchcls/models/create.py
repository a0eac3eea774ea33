"""Creates a bundle from the name of an architecture, with weights from a file, pretrained or random weights."""

import logging
from dataclasses import dataclass, replace

from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.feature_taps import ImageSizeError, eval_mode, find_tap, forward_full, random_image
from batchcls.models.heads import mark_trainable, with_new_head
from batchcls.models.imagenet_labels import known_labels
from batchcls.models.labels import CategoryPaths, Labels, read_category_paths, read_labels
from batchcls.models.model_bundle import Bundle, BundleConfig, OriginKind, WeightsOrigin, sha256_hex
from batchcls.models.model_spec import ArgumentValue, ModelChoices, ModelSpec, PreprocessingOverrides
from batchcls.models.registry import describe_weights
from batchcls.models.sources import find_model, get_library
from batchcls.models.weights import State, from_safetensors, load_strictly, read_weights, to_safetensors
from batchcls.storage.filesystem import Storage, redact_uri

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _LoadedModel:
    spec: ModelSpec
    model: nn.Module
    weights: bytes
    kind: OriginKind
    name: str
    classes: int
    new_head: bool = False


def create_bundle(model: str, choices: ModelChoices, storage: Storage) -> Bundle:
    """Create the bundle of a named architecture.

    Its weights come from a file (`choices.weights`), or are random if that is allowed, or are the pretrained weights
    that the library publishes, which are downloaded.

    Raises:
        InputError: a name or file does not exist, or does not fit the others; the message names the remedy.
    """
    spec = find_model(model, choices.arguments)
    labels = read_labels(choices.labels, storage) if choices.labels is not None else None
    if choices.weights is not None:
        loaded = _load_from_file(spec, choices.weights, storage)
    elif choices.allow_random:
        loaded = _initialize_randomly(spec, labels)
    else:
        loaded = _load_pretrained(spec)
    if choices.new_head:
        loaded = _replace_head(loaded, labels, choices.dropout)
    labels = _check_or_find_labels(loaded, labels)
    paths = choices.category_paths and read_category_paths(choices.category_paths, labels, storage)
    return _build_bundle(loaded, labels, paths or None, choices)


def _load_from_file(spec: ModelSpec, uri: str, storage: Storage) -> _LoadedModel:
    name = redact_uri(uri)
    library = get_library(spec)
    state, data = read_weights(uri, storage)
    adapted = library.adapt(spec, state)
    if adapted.keys() != state.keys():
        data = to_safetensors(adapted)
    model = library.build(spec, None)
    classifiers = library.classifiers(model)
    classes = _require_classes(adapted, classifiers, name)
    if classes != _count_classes(model.state_dict(), classifiers):
        model = library.build(spec, classes)
    load_strictly(model, adapted, name)
    return _LoadedModel(spec, model, data, "file", name.rpartition("/")[2], classes)


def _require_classes(state: State, classifiers: tuple[str, ...], name: str) -> int:
    classes = _count_classes(state, classifiers)
    if classes is None:
        raise InputError(
            f"{name} contains no classifier ({' or '.join(classifiers) or 'the architecture names none'}); check "
            "the architecture's name, or use weights that were trained to classify"
        )
    return classes


def _count_classes(state: State, classifiers: tuple[str, ...]) -> int | None:
    """Return the number of rows of the first classifier's weight; None if the state contains no classifier."""
    weights = (state.get(f"{path}.weight") for path in classifiers)
    return next((int(weight.shape[0]) for weight in weights if weight is not None), None)


def _initialize_randomly(spec: ModelSpec, labels: Labels | None) -> _LoadedModel:
    library = get_library(spec)
    model = library.build(spec, len(labels) if labels else None)
    classes = _require_classes(model.state_dict(), library.classifiers(model), str(spec))
    return _LoadedModel(spec, model, to_safetensors(model.state_dict()), "random", "random", classes)


def _load_pretrained(spec: ModelSpec) -> _LoadedModel:
    description = describe_weights(spec)
    _logger.info("weights of %s: %s", spec, description.summary)
    if description.warning is not None:
        _logger.warning("weights of %s: %s", spec, description.warning)
    library = get_library(spec)
    pretrained = library.pretrained(spec)
    spec = ModelSpec(spec.source, pretrained.architecture, spec.arguments)
    model = library.build(spec, None)
    load_strictly(model, pretrained.state, str(spec))
    classes = _require_classes(pretrained.state, library.classifiers(model), str(spec))
    return _LoadedModel(spec, model, to_safetensors(pretrained.state), "pretrained", str(spec), classes)


def _replace_head(loaded: _LoadedModel, labels: Labels | None, dropout: float | None) -> _LoadedModel:
    """Replace the classifier with a new, untrained one for these labels."""
    if labels is None:
        raise InputError("--new-head needs --labels FILE with the classes of the new head")
    state = from_safetensors(loaded.weights, loaded.name)
    model = with_new_head(get_library(loaded.spec), loaded.spec, state, len(labels), dropout)
    return replace(
        loaded, model=model, weights=to_safetensors(model.state_dict()), classes=len(labels), new_head=True
    )


def _check_or_find_labels(loaded: _LoadedModel, labels: Labels | None) -> Labels:
    """Return the given labels, or those of the public label set with the same number of classes."""
    if labels is None:
        labels = known_labels(loaded.classes)
    if labels is None:
        raise InputError(
            f"the weights of {loaded.spec} have {loaded.classes} classes whose names are not known; pass --labels FILE "
            "with one name per line, in the order of the classes"
        )
    if len(labels) != loaded.classes:
        raise InputError(
            f"--labels has {len(labels)} names, but the weights of {loaded.spec} have {loaded.classes} classes; pass "
            "the labels of these weights, or --new-head to train a new classifier for these labels "
            "(`batchcls bundle create`)"
        )
    return labels


def _size_remedy(loaded: _LoadedModel, size: tuple[int, int]) -> str:
    """Return the options that make an unsupported image size work; each option was tried."""
    library, spec = get_library(loaded.spec), loaded.spec
    default = library.preprocessing(spec, PreprocessingOverrides())
    remedies = [f"omit --input-size to use the default of {default.input_height} x {default.input_width}"]
    state = from_safetensors(loaded.weights, loaded.name)
    options: tuple[dict[str, ArgumentValue], ...] = (
        {"dynamic_img_size": True},
        {"img_size": size[0]},
        {"image_size": size[0]},
    )
    for arguments in options:
        candidate = ModelSpec(spec.source, spec.architecture, {**spec.arguments, **arguments})
        try:
            model = library.build(candidate, loaded.classes)
            if loaded.kind != "random":
                load_strictly(model, state, loaded.name)
            with eval_mode(model):
                forward_full(model, random_image(size))
        except InputError:
            continue
        pairs = ",".join(f"{name}={str(value).lower()}" for name, value in candidate.arguments.items())
        remedies.append(f"or add --model-args {pairs}")
        break
    return ", ".join(remedies)


def _build_bundle(
    loaded: _LoadedModel, labels: Labels, category_paths: CategoryPaths | None, choices: ModelChoices
) -> Bundle:
    spec = loaded.spec
    library = get_library(spec)
    preprocessing = library.preprocessing(spec, choices.overrides)
    size = (preprocessing.input_height, preprocessing.input_width)
    mark_trainable(loaded.model, choices.trainable)  # raises for patterns that match nothing
    try:
        tap = find_tap(spec, loaded.model, library, choices.tap, size)
        backbone = Backbone(loaded.model, library.classifiers(loaded.model), size, tap)
    except ImageSizeError as error:
        raise ImageSizeError(str(spec), size, error.reason, _size_remedy(loaded, size)) from error
    config = BundleConfig(
        source=spec.source,
        architecture=spec.architecture,
        arguments=dict(spec.arguments),
        labels=labels,
        category_paths=category_paths,
        preprocessing=preprocessing,
        embedding_tap=choices.tap,
        embedding_dimension=backbone.dimension,
        weights=WeightsOrigin(kind=loaded.kind, name=loaded.name, sha256=sha256_hex(loaded.weights)),
        untrained_head=loaded.new_head,
        dropout=choices.dropout,
        trainable=choices.trainable,
        lineage=dict(choices.lineage),
    )
    return Bundle(config, loaded.weights)
