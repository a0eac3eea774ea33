"""An architecture's name becomes a bundle: built by its library, with weights of a file, published or random."""

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
class _Loaded:
    spec: ModelSpec
    model: nn.Module
    weights: bytes
    kind: OriginKind
    name: str
    classes: int
    new_head: bool = False


def create_bundle(model: str, choices: ModelChoices, storage: Storage) -> Bundle:
    """The bundle of a named architecture.

    It gets the weights of a file (`choices.weights`), or random ones if allowed, or else the
    library's published ones, downloaded.

    Raises:
        InputError: anything named is missing, unknown or does not fit; the message has the remedy.
    """
    spec = find_model(model, choices.arguments)
    labels = read_labels(choices.labels, storage) if choices.labels is not None else None
    if choices.weights is not None:
        loaded = _from_file(spec, choices.weights, storage)
    elif choices.allow_random:
        loaded = _random(spec, labels)
    else:
        loaded = _published(spec)
    if choices.new_head:
        loaded = _with_new_head(loaded, labels, choices.dropout)
    labels = _fitting_labels(loaded, labels)
    paths = choices.category_paths and read_category_paths(choices.category_paths, labels, storage)
    return _bundle(loaded, labels, paths or None, choices)


def _from_file(spec: ModelSpec, uri: str, storage: Storage) -> _Loaded:
    name = redact_uri(uri)
    library = get_library(spec)
    state, data = read_weights(uri, storage)
    adapted = library.adapt(spec, state)
    if adapted.keys() != state.keys():
        data = to_safetensors(adapted)
    model = library.build(spec, None)
    classifiers = library.classifiers(model)
    classes = _classes_in(adapted, classifiers, name)
    if classes != _count_classes(model.state_dict(), classifiers):
        model = library.build(spec, classes)
    load_strictly(model, adapted, name)
    return _Loaded(spec, model, data, "file", name.rpartition("/")[2], classes)


def _classes_in(state: State, classifiers: tuple[str, ...], name: str) -> int:
    classes = _count_classes(state, classifiers)
    if classes is None:
        raise InputError(
            f"{name} holds no classifier ({' or '.join(classifiers) or 'the architecture names none'}); check "
            "the architecture's name, or take weights that were trained to classify"
        )
    return classes


def _count_classes(state: State, classifiers: tuple[str, ...]) -> int | None:
    """Rows of the first classifier's weight; None if the state holds no classifier."""
    weights = (state.get(f"{path}.weight") for path in classifiers)
    return next((int(weight.shape[0]) for weight in weights if weight is not None), None)


def _random(spec: ModelSpec, labels: Labels | None) -> _Loaded:
    library = get_library(spec)
    model = library.build(spec, len(labels) if labels else None)
    classes = _classes_in(model.state_dict(), library.classifiers(model), str(spec))
    return _Loaded(spec, model, to_safetensors(model.state_dict()), "random", "random", classes)


def _published(spec: ModelSpec) -> _Loaded:
    notes = describe_weights(spec)
    _logger.info("weights of %s: %s", spec, notes.line)
    if notes.warning is not None:
        _logger.warning("weights of %s: %s", spec, notes.warning)
    library = get_library(spec)
    found = library.pretrained(spec)
    spec = ModelSpec(spec.source, found.architecture, spec.arguments)
    model = library.build(spec, None)
    load_strictly(model, found.state, str(spec))
    classes = _classes_in(found.state, library.classifiers(model), str(spec))
    return _Loaded(spec, model, to_safetensors(found.state), "pretrained", str(spec), classes)


def _with_new_head(loaded: _Loaded, labels: Labels | None, dropout: float | None) -> _Loaded:
    """The same body under a new, untrained classifier for these labels."""
    if labels is None:
        raise InputError("--new-head needs --labels FILE: the classes that the new head is to tell apart")
    state = from_safetensors(loaded.weights, loaded.name)
    model = with_new_head(get_library(loaded.spec), loaded.spec, state, len(labels), dropout)
    return replace(
        loaded, model=model, weights=to_safetensors(model.state_dict()), classes=len(labels), new_head=True
    )


def _fitting_labels(loaded: _Loaded, labels: Labels | None) -> Labels:
    if labels is None:
        labels = known_labels(loaded.classes)
    if labels is None:
        raise InputError(
            f"the weights of {loaded.spec} tell {loaded.classes} classes apart and nobody says what they are "
            "called; pass --labels FILE with one name a line, in the order of the classes"
        )
    if len(labels) != loaded.classes:
        raise InputError(
            f"--labels has {len(labels)} names, the weights of {loaded.spec} tell {loaded.classes} classes "
            "apart; pass the list that belongs to these weights, or --new-head to train a classifier for "
            "these labels on top of them (`bundle create`)"
        )
    return labels


def _size_remedy(loaded: _Loaded, size: tuple[int, int]) -> str:
    """What to type instead of a size that the network does not take; only what was tried and works."""
    library, spec = get_library(loaded.spec), loaded.spec
    own = library.preprocessing(spec, PreprocessingOverrides())
    remedies = [f"leave --input-size out, for its own size is {own.input_height} x {own.input_width}"]
    state = from_safetensors(loaded.weights, loaded.name)
    ways: tuple[dict[str, ArgumentValue], ...] = (
        {"dynamic_img_size": True},
        {"img_size": size[0]},
        {"image_size": size[0]},
    )
    for arguments in ways:
        other = ModelSpec(spec.source, spec.architecture, {**spec.arguments, **arguments})
        try:
            model = library.build(other, loaded.classes)
            if loaded.kind != "random":
                load_strictly(model, state, loaded.name)
            with eval_mode(model):
                forward_full(model, random_image(size))
        except InputError:
            continue
        given = ",".join(f"{name}={str(value).lower()}" for name, value in other.arguments.items())
        remedies.append(f"or add --model-args {given}")
        break
    return ", ".join(remedies)


def _bundle(
    loaded: _Loaded, labels: Labels, category_paths: CategoryPaths | None, choices: ModelChoices
) -> Bundle:
    spec = loaded.spec
    library = get_library(spec)
    preprocessing = library.preprocessing(spec, choices.overrides)
    size = (preprocessing.input_height, preprocessing.input_width)
    mark_trainable(loaded.model, choices.trainable)  # refuses patterns that match nothing
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
