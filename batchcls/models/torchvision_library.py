"""The library torchvision: its architectures, its presets, its weights."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models as torchvision_models

from batchcls.errors import InputError
from batchcls.models.library import (
    ArgumentValue,
    ModelSpec,
    PreprocessingOverrides,
    Pretrained,
    bad_arguments,
    make_preprocessing,
    no_download,
    refuse_reserved,
    repeatable_initialisation,
    require_reachable,
)
from batchcls.models.weights import State
from batchcls.preprocessing import Preprocessing

_RESERVED = {
    "num_classes": "the number of classes follows from the weights, or from --labels; leave it out",
    "weights": "name the tag in --model instead, as in torchvision:resnet50.IMAGENET1K_V2",
    "progress": "leave it out",
    "aux_logits": "heads that are used in training only are left off; leave it out",
    "init_weights": "weights are loaded; leave it out",
}

# Two architectures have heads that only training uses. Their own initialisation takes minutes, for
# nothing here, and their published weights expect an older normalisation (`transform_input`).
_TRAINING_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
_WITHOUT_TRAINING_HEADS = {"aux_logits": False, "init_weights": False}

# DenseNet files are older than the rule that forbids dots in module names: `norm.1` is `norm1` now.
_DENSENET_KEY = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


class TorchvisionLibrary:
    """`torchvision:NAME` and `torchvision:NAME.TAG`, where TAG is a member of its weights enum."""

    def names(self) -> Sequence[str]:
        """Names of all image classifiers, without tags."""
        return list(torchvision_models.list_models(module=torchvision_models))

    def check(self, architecture: str) -> bool:
        """Whether the architecture exists. Raises InputError for an unknown tag of a known one."""
        base, _, tag = architecture.partition(".")
        if base not in self.names():
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

    def build(self, spec: ModelSpec, classes: int | None) -> nn.Module:
        """The architecture with random weights; None classes: as many as its weights have."""
        options = _WITHOUT_TRAINING_HEADS if _base(spec) in _TRAINING_HEADS else {}
        classes = classes or len(_weights(spec).meta["categories"])
        refuse_reserved(spec, _RESERVED)
        try:
            with repeatable_initialisation():
                model: nn.Module = torchvision_models.get_model(
                    _base(spec), weights=None, num_classes=classes, **options, **spec.arguments
                )
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise bad_arguments(spec, error) from error
        return model

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """The last linear or convolutional layer, which is the classifier in all of them."""
        layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        return tuple(layers[-1:])

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


def _base(spec: ModelSpec) -> str:
    return spec.architecture.partition(".")[0]


def _weights(spec: ModelSpec) -> Any:
    base, _, tag = spec.architecture.partition(".")
    return torchvision_models.get_model_weights(base)[tag or "DEFAULT"]


def _is_cached(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()
