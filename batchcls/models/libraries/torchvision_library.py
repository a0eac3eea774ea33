"""The library torchvision: architectures, presets and weights."""

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
    download_error,
    make_preprocessing,
    refuse_reserved,
    repeatable_initialization,
    require_reachable,
)
from batchcls.models.model_spec import ArgumentValue, ModelSpec, PreprocessingOverrides
from batchcls.models.weights import State
from batchcls.preprocessing import Preprocessing

_RESERVED = {
    "num_classes": "the number of classes follows from the weights or from --labels; omit it",
    "weights": "name the tag in --model instead, as in torchvision:resnet50.IMAGENET1K_V2",
    "progress": "omit it",
    "aux_logits": "auxiliary training heads are never built; omit it",
    "init_weights": "weights are loaded from a file; omit it",
}

# Two architectures have auxiliary heads for training. Their own initialization takes minutes and is not needed, and
# their pretrained weights expect an older normalization (`transform_input`).
_TRAINING_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_WITHOUT_TRAINING_HEADS = {"aux_logits": False, "init_weights": False}

# DenseNet files are older than the rule that forbids dots in module names; `norm.1` is now `norm1`.
_DENSENET_KEY = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


class TorchvisionLibrary:
    """`torchvision:NAME` and `torchvision:NAME.TAG`, where TAG is a member of its weights enum."""

    def check(self, architecture: str) -> bool:
        """Return whether the architecture exists; see `Library.check`."""
        base, _, tag = architecture.partition(".")
        if base not in torchvision_models.list_models(module=torchvision_models):
            return False
        tags = [*torchvision_models.get_model_weights(base).__members__]
        if tag and tag not in tags:
            raise InputError(f"torchvision:{base} has no weights tagged {tag!r}; it has {', '.join(tags)}")
        return True

    def complete(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the arguments that its pretrained weights require, unless they are given."""
        base = _base(spec)
        defaults: dict[str, ArgumentValue] = {}
        if base in _TRAINING_HEADS:
            defaults = {"transform_input": True}
        elif base.startswith("vit_"):
            defaults = {"image_size": _weights(spec).meta["min_size"][0]}
        return ModelSpec(spec.source, spec.architecture, {**defaults, **spec.arguments})

    def build(self, spec: ModelSpec, classes: int | None, dropout: float | None = None) -> nn.Module:
        """Build the architecture with random weights; see `Library.build`."""
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
        """Return the path of the last linear or convolutional layer, which is always the classifier."""
        layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        return tuple(layers[-1:])

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """Return the last feature map of each size, or each layer of a vision transformer.

        A feature map is the output of a module at most two levels deep (`layer1`, `features.3`) in front of the final
        pooling and the classifier. For example, the stages of a ResNet are its maps at 1/2 (after the first ReLU), 1/4,
        1/8, 1/16 and 1/32 of the image's side.
        """
        if isinstance(model, VisionTransformer):
            return _transformer_layers(model)
        layout: Layout = "NHWC" if isinstance(model, SwinTransformer) else "NCHW"
        channel_axis, height_axis = (3, 1) if layout == "NHWC" else (1, 2)
        last: dict[int, tuple[str, torch.Tensor]] = {}
        for path, features in _feature_maps(model, self.classifiers(model), input_size):
            last[round(math.log2(input_size[0] / features.shape[height_axis]))] = path, features
        return tuple(
            FeatureStage(f"stage{number}", path, layout, features.shape[channel_axis], 2**halvings)
            for number, (halvings, (path, features)) in enumerate(sorted(last.items()), start=1)
        )

    def preprocessing(self, spec: ModelSpec, overrides: PreprocessingOverrides) -> Preprocessing:
        """Return the preset of the pretrained weights. Another input size keeps the preset's crop ratio."""
        preset = _weights(spec).transforms()
        (crop,), (resize,) = preset.crop_size, preset.resize_size
        side = int(spec.arguments.get("image_size") or crop)
        height, width = overrides.input_size or (side, side)
        resize_height, resize_width = (
            int(side / overrides.crop_pct) if overrides.crop_pct else side * resize // crop
            for side in (height, width)
        )
        values = {
            "input_height": height,
            "input_width": width,
            "resize_height": resize_height,
            "resize_width": resize_width,
            "interpolation": preset.interpolation.value,
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
        }
        return make_preprocessing(str(spec), values, overrides)

    def adapt(self, spec: ModelSpec, state: State) -> State:
        """Return a published state with current names, without auxiliary training heads."""
        base = _base(spec)
        if base.startswith("densenet"):
            state = {_DENSENET_KEY.sub(r"\1\2", name): tensor for name, tensor in state.items()}
        heads = _TRAINING_HEADS.get(base, ())
        return (
            {name: tensor for name, tensor in state.items() if not name.startswith(heads)} if heads else state
        )

    def pretrained(self, spec: ModelSpec) -> Pretrained:
        """Load the pretrained weights with torchvision, from its cache or from the network.

        Raises:
            InputError: the download failed.
        """
        weights = _weights(spec)
        try:
            if not _is_cached(weights.url):
                require_reachable(weights.url)
            state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise download_error(spec, error) from error
        return Pretrained(f"{_base(spec)}.{weights.name}", self.adapt(spec, dict(state)))


def _transformer_layers(model: VisionTransformer) -> tuple[FeatureStage, ...]:
    """Return the encoder layers as stages; the first token is the class token."""
    paths = [f"encoder.layers.{name}" for name, _ in model.get_submodule("encoder.layers").named_children()]
    return tuple(
        FeatureStage(f"stage{number}", path, "tokens", model.hidden_dim, model.patch_size, prefix=1)
        for number, path in enumerate(paths, start=1)
    )


def _feature_maps(
    model: nn.Module, classifiers: tuple[str, ...], input_size: tuple[int, int]
) -> list[tuple[str, torch.Tensor]]:
    """Return the feature maps in front of the final pooling, in the order in which their modules finished."""
    outputs = capture_outputs(model, _sequential_modules(model, classifiers), input_size)
    body = takewhile(
        lambda output: not isinstance(model.get_submodule(output[0]), nn.AdaptiveAvgPool2d), outputs
    )
    return [(path, features) for path, features in body if features.ndim == 4]


def _sequential_modules(model: nn.Module, classifiers: tuple[str, ...]) -> Iterator[str]:
    """Yield the paths of the modules that run sequentially, at most two levels deep.

    Only sequences are entered, because other modules may have branches whose outputs are parts of a feature map. The
    final normalization and change of layout of a Swin are omitted, as in timm.
    """
    heads = {path.partition(".")[0] for path in classifiers}
    for name, module in model.named_children():
        if name in heads or (isinstance(model, SwinTransformer) and name != "features"):
            continue
        yield name
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield from (f"{name}.{child}" for child, _ in module.named_children())


def _base(spec: ModelSpec) -> str:
    return spec.architecture.partition(".")[0]


def _weights(spec: ModelSpec) -> Any:
    base, _, tag = spec.architecture.partition(".")
    return torchvision_models.get_model_weights(base)[tag or "DEFAULT"]


def _is_cached(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()
