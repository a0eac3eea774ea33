"""Splits a classifier so that one forward pass returns both the logits and the embedding.

Shapes: N images, H x W pixels, K classes, D values of an embedding, F features of a network.

A classifier is split in front of its last layer into *trunk* (image -> F), *pool* (F -> embedding) and *head*
(F -> logits). In nearly every network F is the embedding itself, and the head is one linear layer. The split is
verified on a random image when a backbone is created: it must return the logits of the full network. The embedding
may instead come from a stage in the middle of the network (feature_taps.py), with the same split and verification.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.feature_taps import FeatureStage, FeatureTap, forward_full, random_image
from batchcls.models.heads import DropoutLinear

_TOLERANCE = 1e-4
_PROBE_SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class _Split:
    trunk: nn.Module
    pool: nn.Module
    head: nn.Module
    head_tensors: tuple[str, ...] = ()


class Backbone(nn.Module):
    """A frozen classifier that returns logits and embedding.

    Attributes:
        classes: number of classes, K.
        dimension: length of the embedding, D.
        head_tensors: names of the weight and the bias of the head in the state of the full network; empty if the head
            is not one linear layer on the pooled embedding.
    """

    classes: int
    dimension: int
    head_tensors: tuple[str, ...]

    def __init__(
        self,
        model: nn.Module,
        classifiers: tuple[str, ...],
        input_size: tuple[int, int],
        tap: FeatureStage | None = None,
    ) -> None:
        """Split `model`, which is modified in place and owned by this object afterwards.

        Args:
            model: an image classifier, float N,3,H,W -> N,K, with its weights loaded.
            classifiers: paths of the modules in it that map features to logits.
            input_size: H, W of the images with which the split is verified.
            tap: stage from which the embedding is taken. None: the pooled input of the classifier.

        Raises:
            InputError: the network does not accept this size, cannot be split, or has no such stage.
        """
        super().__init__()
        model.eval().requires_grad_(False)
        first, second = (random_image(input_size, seed) for seed in _PROBE_SEEDS)
        name = type(model).__name__
        with torch.no_grad():
            expected = _full_logits(model, second, name)
            self._tap = None if tap is None else FeatureTap(model, tap)
            split = _split(model, classifiers, first)
            self.trunk, self.pool, self.head = split.trunk, split.pool, split.head
            self.head_tensors = split.head_tensors
            self.train(False)
            logits, embedding = self._checked_forward(second, name)
        _check_logits(logits, expected, name)
        self.classes, self.dimension = logits.shape[1], embedding.shape[1]
        if tap is not None and tap.channels != self.dimension:
            raise InputError(f"{tap.name} of {name} has {self.dimension} channels instead of {tap.channels}")

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode. Raises RuntimeError if `mode` is True."""
        if mode:
            raise RuntimeError("a Backbone stays in eval mode; train the model that it is created from")
        super().train(False)
        return self

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (N,K float32) and embedding (N,D float32) of normalized images (N,3,H,W float).

        Under autocast the trunk runs in the lower precision. Pool and head stay in float32, because a logit in
        bfloat16 has only three significant digits.
        """
        features = self.trunk(images)
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            embedding = self.pool(features) if self._tap is None else self._tap.take()
            return self.head(features), embedding

    def _checked_forward(self, images: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            logits, embedding = self(images)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{name} cannot be split in front of its classifier ({error})") from error
        if embedding.ndim != 2:
            raise InputError(
                f"{name} does not compute one vector per image in front of its classifier: {embedding.shape}"
            )
        return logits, embedding


def _full_logits(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    logits = forward_full(model, images)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f"{name} is not a classifier: it does not return one row of logits per image")
    return logits.float()


def _check_logits(logits: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(expected).all()):
        raise InputError(f"{name} with these weights returns NaN or infinity for a random image")
    scale = float(expected.abs().max())
    if logits.shape != expected.shape or float((logits - expected).abs().max()) > _TOLERANCE * scale:
        raise InputError(
            f"{name}, split in front of its classifier, does not return the logits of the full network; "
            "choose another architecture"
        )


def _split(model: nn.Module, classifiers: tuple[str, ...], probe: torch.Tensor) -> _Split:
    name = type(model).__name__
    if name in _SPECIAL_SPLITS:
        return _SPECIAL_SPLITS[name](model)
    heads = [_as_linear(model, path) for path in classifiers]
    if not heads:
        raise InputError(f"{name} does not name its classifier; choose an architecture that does")
    if len(heads) == 1:
        tensors = _tensor_names(heads[0], classifiers[0])
        model.set_submodule(classifiers[0], nn.Identity())
        return _Split(model, nn.Identity(), heads[0], tensors)
    return _split_multi_head(model, classifiers, heads, probe)


def _as_linear(model: nn.Module, path: str) -> nn.Linear:
    """Return the classifier at `path` as a linear layer on vectors; 1 x 1 convolutions are converted."""
    layer = model.get_submodule(path)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return _linear(layer.weight.flatten(1), layer.bias)
    if isinstance(layer, nn.Linear):
        return layer
    raise InputError(
        f"the classifier {path} of {type(model).__name__} is a {type(layer).__name__}, not a linear layer"
    )


def _tensor_names(layer: nn.Linear, path: str) -> tuple[str, ...]:
    """Return the names of weight and bias; empty for a subclass that may compute something else than their product."""
    if type(layer) not in (nn.Linear, DropoutLinear):
        return ()
    return tuple(f"{path}.{name}" for name, _ in layer.named_parameters())


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    classes, dimension = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(dimension, classes, bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


class _PadFeatures(nn.Module):
    """Replaces one of several classifiers: returns its input, padded with zeros to the combined feature vector."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.padding = (before, after)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(features, self.padding)


class _OneHot(nn.Module):
    """Replaces one of several classifiers for one pass: returns the one-hot vector of its index."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.index, self.count = index, count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        one_hot = features.new_zeros(features.shape[0], self.count)
        one_hot[:, self.index] = 1
        return one_hot


def _split_multi_head(
    model: nn.Module, paths: tuple[str, ...], heads: list[nn.Linear], probe: torch.Tensor
) -> _Split:
    """Split a network that returns a weighted sum of several classifiers.

    Distilled transformers average two classifiers, for example. The network itself computes the sum, but of padded
    feature vectors instead of logits. The result, which already contains the weights of the sum, is the embedding,
    and the concatenated classifiers are one linear head. A pass with one-hot vectors determines the weights, which are
    also applied to the biases.
    """
    for index, path in enumerate(paths):
        model.set_submodule(path, _OneHot(index, len(paths)))
    sum_weights = model(probe)[0]
    before, total = 0, sum(head.in_features for head in heads)
    for path, head in zip(paths, heads, strict=True):
        after = total - before - head.in_features
        model.set_submodule(path, _PadFeatures(before, after))
        before += head.in_features
    weight = torch.cat([head.weight for head in heads], dim=1)
    biases = [
        factor * head.bias for factor, head in zip(sum_weights, heads, strict=True) if head.bias is not None
    ]
    return _Split(model, nn.Identity(), _linear(weight, sum(biases) if biases else None))


def _split_squeezenet(model: nn.Module) -> _Split:
    """Split torchvision's SqueezeNet, which classifies each position of the feature map and averages the logits."""
    features, classifier = model.get_submodule("features"), model.get_submodule("classifier")
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return _Split(features, pool, nn.Sequential(classifier, nn.Flatten(1)))


class _MethodModule(nn.Module):
    """A method of a timm network as a module."""

    def __init__(self, model: nn.Module, method: str, **options: bool) -> None:
        super().__init__()
        self.model, self.method, self.options = model, method, options

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = getattr(self.model, self.method)(value, **self.options)
        return output


def _split_by_methods(model: nn.Module) -> _Split:
    """Split with timm's `forward_features` and `forward_head`, for heads that are not a sum of linear layers."""
    return _Split(
        _MethodModule(model, "forward_features"),
        _MethodModule(model, "forward_head", pre_logits=True),
        _MethodModule(model, "forward_head"),
    )


_SPECIAL_SPLITS: dict[str, Callable[[nn.Module], _Split]] = {
    "SqueezeNet": _split_squeezenet,
    "VOLO": _split_by_methods,  # adds the maximum of the logits over all positions to the logits of the image
    "LevitDistilled": _split_by_methods,  # for some of them timm's configuration names only one of two classifiers
}
