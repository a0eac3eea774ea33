"""One forward pass, two answers: the logits, and the embedding they are computed from.

Letters: N images, H x W pixels, K classes, D values of an embedding, F a network's features.

A classifier is cut in front of its last layer: *trunk* (image -> F), *pool* (F -> embedding) and
*head* (F -> logits). In nearly every network F is the embedding itself and the head one linear
layer. The cut is proven on a random image when a backbone is made: it must give the logits of the
intact network, or there is no backbone. An embedding may be tapped from a stage in the middle of the
network instead (taps.py); the cut and its proof stay the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.feature_taps import FeatureStage, FeatureTap, forward_full, random_image

_TOLERANCE = 1e-4
_PROBE_SEEDS = (0, 1)


@dataclass(frozen=True, slots=True)
class _Cut:
    trunk: nn.Module
    pool: nn.Module
    head: nn.Module


class Backbone(nn.Module):
    """A frozen classifier that answers with logits and embedding.

    Attributes:
        classes: K.
        dimension: D.
    """

    classes: int
    dimension: int

    def __init__(
        self,
        model: nn.Module,
        classifiers: tuple[str, ...],
        input_size: tuple[int, int],
        tap: FeatureStage | None = None,
    ) -> None:
        """Cut `model`, which is modified in place and owned by this object afterwards.

        Args:
            model: an image classifier, float N,3,H,W -> N,K, with its weights loaded.
            classifiers: paths of the modules in it that turn features into logits.
            input_size: an H, W that the network takes; the cut is proven at it.
            tap: the stage that gives the embedding; None: it is what the classifier reads, pooled.

        Raises:
            InputError: the network does not take this size, cannot be cut, or has no such stage.
        """
        super().__init__()
        model.eval().requires_grad_(False)
        first, second = (random_image(input_size, seed) for seed in _PROBE_SEEDS)
        name = type(model).__name__
        with torch.no_grad():
            expected = _intact_answer(model, second, name)
            self._tap = None if tap is None else FeatureTap(model, tap)
            cut = _cut(model, classifiers, first)
            self.trunk, self.pool, self.head = cut.trunk, cut.pool, cut.head
            self.train(False)
            logits, embedding = self._answer_or_refuse(second, name)
        _require_equal(logits, expected, name)
        self.classes, self.dimension = logits.shape[1], embedding.shape[1]
        if tap is not None and tap.channels != self.dimension:
            raise InputError(f"{tap.name} of {name} has {self.dimension} channels, and not {tap.channels}")

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode. Raises RuntimeError when asked to train."""
        if mode:
            raise RuntimeError("a Backbone stays in eval mode; train the model it is made from")
        super().train(False)
        return self

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N,K float32) and embedding (N,D float32) of normalized images (N,3,H,W float).

        Under autocast the trunk runs in the lower precision; pool and head stay in float32, since
        a logit in bfloat16 has three digits.
        """
        features = self.trunk(images)
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            embedding = self.pool(features) if self._tap is None else self._tap.take()
            return self.head(features), embedding

    def _answer_or_refuse(self, images: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            logits, embedding = self(images)
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{name} cannot be cut in front of its classifier ({error})") from error
        if embedding.ndim != 2:
            raise InputError(f"{name} gives no vector an image in front of its classifier: {embedding.shape}")
        return logits, embedding


def _intact_answer(model: nn.Module, images: torch.Tensor, name: str) -> torch.Tensor:
    logits = forward_full(model, images)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f"{name} is no classifier: it does not answer with one row of logits an image")
    return logits.float()


def _require_equal(logits: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(expected).all()):
        raise InputError(f"{name} with these weights answers NaN or infinity to a random image")
    scale = float(expected.abs().max())
    if logits.shape != expected.shape or float((logits - expected).abs().max()) > _TOLERANCE * scale:
        raise InputError(
            f"{name}, cut in front of its classifier, does not give the logits of the intact network; "
            "choose another architecture"
        )


def _cut(model: nn.Module, classifiers: tuple[str, ...], probe: torch.Tensor) -> _Cut:
    name = type(model).__name__
    if name in _SPECIAL_CUTS:
        return _SPECIAL_CUTS[name](model)
    heads = [_as_linear(model, path) for path in classifiers]
    if not heads:
        raise InputError(f"{name} names no classifier; choose an architecture that has one")
    if len(heads) == 1:
        model.set_submodule(classifiers[0], nn.Identity())
        return _Cut(model, nn.Identity(), heads[0])
    return _cut_many(model, classifiers, heads, probe)


def _as_linear(model: nn.Module, path: str) -> nn.Linear:
    """The classifier at `path` as a linear layer on vectors; a 1 x 1 convolution is one, too."""
    layer = model.get_submodule(path)
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return _linear(layer.weight.flatten(1), layer.bias)
    if isinstance(layer, nn.Linear):
        return layer
    raise InputError(
        f"the classifier {path} of {type(model).__name__} is a {type(layer).__name__}, and no linear layer"
    )


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    classes, dimension = weight.shape
    with torch.device("meta"):
        layer = nn.Linear(dimension, classes, bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


class _ScatterInput(nn.Module):
    """Stands where one of several classifiers stood: its input between zeros in a longer vector."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.padding = (before, after)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(features, self.padding)


class _Mark(nn.Module):
    """Stands where one of several classifiers stood, for one pass: answers which one it is."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.index, self.count = index, count

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        mark = features.new_zeros(features.shape[0], self.count)
        mark[:, self.index] = 1
        return mark


def _cut_many(model: nn.Module, paths: tuple[str, ...], heads: list[nn.Linear], probe: torch.Tensor) -> _Cut:
    """Cut a network that adds up several classifiers, each with a weight of its own.

    Distilled transformers average two, for example. The network itself does the adding: of places
    in one long vector instead of logits, so that this vector, the weights already in it, is the
    embedding, and all classifiers side by side are one linear head. A pass of marks tells the
    weights, which the biases still need.
    """
    for index, path in enumerate(paths):
        model.set_submodule(path, _Mark(index, len(paths)))
    shares = model(probe)[0]
    before, total = 0, sum(head.in_features for head in heads)
    for path, head in zip(paths, heads, strict=True):
        after = total - before - head.in_features
        model.set_submodule(path, _ScatterInput(before, after))
        before += head.in_features
    weight = torch.cat([head.weight for head in heads], dim=1)
    biases = [share * head.bias for share, head in zip(shares, heads, strict=True) if head.bias is not None]
    return _Cut(model, nn.Identity(), _linear(weight, sum(biases) if biases else None))


def _cut_squeezenet(model: nn.Module) -> _Cut:
    """torchvision's SqueezeNet classifies each place of the feature map, then takes the mean."""
    features, classifier = model.get_submodule("features"), model.get_submodule("classifier")
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    return _Cut(features, pool, nn.Sequential(classifier, nn.Flatten(1)))


class _MethodModule(nn.Module):
    """One method of a timm network as a module."""

    def __init__(self, model: nn.Module, method: str, **options: bool) -> None:
        super().__init__()
        self.model, self.method, self.options = model, method, options

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = getattr(self.model, self.method)(value, **self.options)
        return answer


def _cut_by_stages(model: nn.Module) -> _Cut:
    """timm's own two stages, for heads that are no sum of linear layers in front of nothing else."""
    return _Cut(
        _MethodModule(model, "forward_features"),
        _MethodModule(model, "forward_head", pre_logits=True),
        _MethodModule(model, "forward_head"),
    )


_SPECIAL_CUTS: dict[str, Callable[[nn.Module], _Cut]] = {
    "SqueezeNet": _cut_squeezenet,
    "VOLO": _cut_by_stages,  # adds the largest answer of any place to the answer of the whole
    "LevitDistilled": _cut_by_stages,  # timm's record of some names only one of the two classifiers
}
