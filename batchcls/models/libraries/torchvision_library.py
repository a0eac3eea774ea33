"""The library torchvision: its architectures, its presets, its weights."""

import math
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import SwinTransformer, VisionTransformer

from batchcls.errors import InputError
from batchcls.models.feature_taps import FeatureStage, Layout, capture_outputs
from batchcls.models.heads import set_dropout
from batchcls.models.libraries.library import (
    Pretrained,
    bad_arguments,
    make_preprocessing,
    no_download,
    refuse_reserved,
    repeatable_initialization,
    require_reachable,
)
from batchcls.models.model_spec import ArgumentValue, ModelSpec, PreprocessingOverrides
from batchcls.models.weights import State
from batchcls.preprocessing import Preprocessing

_RESERVED = {
    "num_classes": "the number of classes follows from the weights, or from --labels; leave it out",
    "weights": "name the tag in --model instead, as in torchvision:resnet50.IMAGENET1K_V2",
    "progress": "leave it out",
    "aux_logits": "heads that are used in training only are left off; leave it out",
    "init_weights": "weights are loaded; leave it out",
}

# Two architectures have heads that only training uses. Their own initialization takes minutes, for
# nothing here, and their published weights expect an older normalization (`transform_input`).
_TRAINING_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_WITHOUT_TRAINING_HEADS = {"aux_logits": False, "init_weights": False}

# DenseNet files are older than the rule that forbids dots in module names: `norm.1` is `norm1` now.
_DENSENET_KEY = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


class TorchvisionLibrary:
    """`torchvision:NAME` and `torchvision:NAME.TAG`, where TAG is a member of its weights enum."""

    def check(self, architecture: str) -> bool:
        """Whether the architecture exists. Raises InputError for an unknown tag of a known one."""
        base, _, tag = architecture.partition(".")
        if base not in torchvision_models.list_models(module=torchvision_models):
            return False
        tags = [*torchvision_models.get_model_weights(base).__members__]
        if tag and tag not in tags:
            raise InputError(f"torchvision:{base} has no weights tagged {tag!r}; it has {', '.join(tags)}")
        return True

    def complete(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the arguments that its published weights ask for, unless they are given."""
        base = _base(spec)
        defaults: dict[str, ArgumentValue] = {}
        if base in _TRAINING_HEADS:
            defaults = {"transform_input": True}
        elif base.startswith("vit_"):
            defaults = {"image_size": _weights(spec).meta["min_size"][0]}
        return ModelSpec(spec.source, spec.architecture, {**defaults, **spec.arguments})

    def build(self, spec: ModelSpec, classes: int | None, dropout: float | None = None) -> nn.Module:
        """The architecture with random weights; see `Library.build`."""
        options = _WITHOUT_TRAINING_HEADS if _base(spec) in _TRAINING_HEADS else {}
        classes = classes or len(_weights(spec).meta["categories"])
        refuse_reserved(spec, _RESERVED)
        try:
            with repeatable_initialization():
                model: nn.Module = torchvision_models.get_model(
                    _base(spec), weights=None, num_classes=classes, **options, **spec.arguments
                )
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise bad_arguments(spec, error) from error
        if dropout is not None:
            set_dropout(model, self.classifiers(model), dropout)
        return model

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """The last linear or convolutional layer, which is the classifier in all of them."""
        layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        return tuple(layers[-1:])

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """The last feature map of each size, or each layer of a vision transformer.

        A map is what a module at most two levels deep gives (`layer1`, `features.3`), in front of
        the final pooling and the classifier. So the stages of a ResNet are its maps at 1/2 (after
        the first ReLU), 1/4, 1/8, 1/16 and 1/32 of the image's side.
        """
        if isinstance(model, VisionTransformer):
            return _transformer_layers(model)
        layout: Layout = "NHWC" if isinstance(model, SwinTransformer) else "NCHW"
        across, down = (3, 1) if layout == "NHWC" else (1, 2)
        last: dict[int, tuple[str, torch.Tensor]] = {}
        for path, features in _feature_maps(model, self.classifiers(model), input_size):
            last[round(math.log2(input_size[0] / features.shape[down]))] = path, features
        return tuple(
            FeatureStage(f"stage{number}", path, layout, features.shape[across], 2**halvings)
            for number, (halvings, (path, features)) in enumerate(sorted(last.items()), start=1)
        )

    def preprocessing(self, spec: ModelSpec, overrides: PreprocessingOverrides) -> Preprocessing:
        """The preset of the published weights; another input size keeps the preset's share of crop."""
        preset = _weights(spec).transforms()
        (crop,), (resize,) = preset.crop_size, preset.resize_size
        side = int(overrides.input_size or spec.arguments.get("image_size") or crop)
        resized = int(side / overrides.crop_pct) if overrides.crop_pct else side * resize // crop
        values = {
            "input_height": side,
            "input_width": side,
            "resize_height": resized,
            "resize_width": resized,
            "interpolation": preset.interpolation.value,
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
        }
        return make_preprocessing(str(spec), values, overrides)

    def adapt(self, spec: ModelSpec, state: State) -> State:
        """A published state under today's names, without the heads that are used in training only."""
        base = _base(spec)
        if base.startswith("densenet"):
            state = {_DENSENET_KEY.sub(r"\1\2", name): tensor for name, tensor in state.items()}
        heads = _TRAINING_HEADS.get(base, ())
        return (
            {name: tensor for name, tensor in state.items() if not name.startswith(heads)} if heads else state
        )

    def pretrained(self, spec: ModelSpec) -> Pretrained:
        """Download the published weights through torchvision, or take them from its cache.

        Raises:
            InputError: the network does not answer.
        """
        weights = _weights(spec)
        try:
            if not _is_cached(weights.url):
                require_reachable(weights.url)
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise no_download(spec, error) from error
        return Pretrained(f"{_base(spec)}.{weights.name}", self.adapt(spec, dict(state)))


def _transformer_layers(model: VisionTransformer) -> tuple[FeatureStage, ...]:
    """The encoder's layers; the first of their tokens is the class token."""
    names = [f"encoder.layers.{name}" for name, _ in model.get_submodule("encoder.layers").named_children()]
    return tuple(
        FeatureStage(f"stage{number}", path, "tokens", model.hidden_dim, model.patch_size, prefix=1)
        for number, path in enumerate(names, start=1)
    )


def _feature_maps(
    model: nn.Module, classifiers: tuple[str, ...], input_size: tuple[int, int]
) -> list[tuple[str, torch.Tensor]]:
    """Maps in front of the final pooling, in the order in which their modules ended."""
    seen = capture_outputs(model, _chain(model, classifiers), input_size)
    body = takewhile(lambda item: not isinstance(model.get_submodule(item[0]), nn.AdaptiveAvgPool2d), seen)
    return [(path, features) for path, features in body if features.ndim == 4]


def _chain(model: nn.Module, classifiers: tuple[str, ...]) -> Iterator[str]:
    """Paths of the modules that an image goes through one after the other, at most two levels deep.

    Inside of anything but a sequence there may be branches, whose outputs are parts of a map. A
    Swin ends its features with a normalization and a change of layout; both are left out, as they
    are in timm.
    """
    heads = {path.partition(".")[0] for path in classifiers}
    for name, module in model.named_children():
        if name in heads or (isinstance(model, SwinTransformer) and name != "features"):
            continue
        yield name
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield from (f"{name}.{inner}" for inner, _ in module.named_children())


def _base(spec: ModelSpec) -> str:
    return spec.architecture.partition(".")[0]


def _weights(spec: ModelSpec) -> Any:
    base, _, tag = spec.architecture.partition(".")
    return torchvision_models.get_model_weights(base)[tag or "DEFAULT"]


def _is_cached(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()
