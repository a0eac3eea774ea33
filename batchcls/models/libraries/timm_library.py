"""The library timm: architectures, configurations and weights."""

import math
from typing import Any

import huggingface_hub
import timm
import torch
from timm.data.config import resolve_data_config
from torch import nn

from batchcls.errors import InputError
from batchcls.models.feature_taps import FeatureStage, Layout, capture_outputs, eval_mode, random_image
from batchcls.models.heads import check_dropout
from batchcls.models.libraries.library import (
    Pretrained,
    bad_arguments,
    download_error,
    make_preprocessing,
    refuse_reserved,
    repeatable_initialization,
    require_reachable,
)
from batchcls.models.model_spec import ModelSpec, PreprocessingOverrides
from batchcls.models.weights import State
from batchcls.preprocessing import Preprocessing

_RESERVED = {
    "num_classes": "the number of classes follows from the weights or from --labels; omit it",
    "in_chans": "images always have three channels; omit it",
    "features_only": "a classifier is required; omit it",
    "pretrained": "weights are downloaded unless --weights is given; omit it",
    "pretrained_cfg": "name the tag in --model instead, as in timm:NAME.TAG",
    "pretrained_cfg_overlay": "use --mean, --std, --input-size, --crop-pct, --interpolation",
    "checkpoint_path": "use --weights FILE",
    "cache_dir": "set HF_HOME in the environment instead",
}

_TRAINING_HEADS = {"inception_v3": "AuxLogits."}
_TOLERANCE = 1e-4
_HUB_FILE = "model.safetensors"


class TimmLibrary:
    """`timm:NAME` and `timm:NAME.TAG`."""

    def check(self, architecture: str) -> bool:
        """Return whether the architecture exists; see `Library.check`."""
        base, _, tag = architecture.partition(".")
        if not timm.is_model(base):
            return False
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise InputError(
                f"timm:{base} has no weights tagged {tag!r}; it has {', '.join(sorted(tags)) or 'none'}"
            )
        return True

    def complete(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec unchanged, because timm stores the arguments of its weights under name and tag."""
        return spec

    def build(self, spec: ModelSpec, classes: int | None, dropout: float | None = None) -> nn.Module:
        """Build the architecture with random weights; see `Library.build`.

        Dropout is timm's `drop_rate`, which applies to the input of the classifier.
        """
        if dropout is not None:
            arguments = {**spec.arguments, "drop_rate": check_dropout(dropout)}
            spec = ModelSpec(spec.source, spec.architecture, arguments)
        return _create(spec, pretrained=False, num_classes=classes)

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Return the paths of the modules, almost always one, that map features to logits."""
        configuration: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        paths = configuration.get("classifier") or ()
        return (paths,) if isinstance(paths, str) else tuple(paths)

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """Return the feature maps of `features_only=True`, each at the module that outputs it.

        timm's `feature_info` names a module for each feature map. A module is a stage if its pooled output for a
        random image equals timm's own pooled feature map, because some entries name a module that does not run or
        outputs only a part of the map.
        """
        feature_info = _feature_info(model)
        modules = dict(model.named_modules())
        paths = {str(entry["module"]) for entry in feature_info} & modules.keys() - {""}
        outputs = dict(capture_outputs(model, paths, input_size))
        maps = _intermediate_maps(model, input_size) if outputs else []
        if len(maps) != len(feature_info):
            return ()
        stages = (
            _verified_stage(f"stage{number}", entry, outputs.get(entry["module"]), features)
            for number, (entry, features) in enumerate(zip(feature_info, maps, strict=True), start=1)
        )
        return tuple(stage for stage in stages if stage is not None)

    def preprocessing(self, spec: ModelSpec, overrides: PreprocessingOverrides) -> Preprocessing:
        """Return the preprocessing of timm's own evaluation of the pretrained weights."""
        resolve: Any = resolve_data_config
        resolved = resolve(_data_arguments(spec, overrides), _configuration(spec).to_dict())
        _, height, width = resolved["input_size"]
        values = {
            "input_height": height,
            "input_width": width,
            "resize_height": math.floor(height / resolved["crop_pct"]),
            "resize_width": math.floor(width / resolved["crop_pct"]),
            **{name: resolved[name] for name in ("crop_mode", "interpolation", "mean", "std")},
        }
        return make_preprocessing(str(spec), values, overrides)

    def adapt(self, spec: ModelSpec, state: State) -> State:
        """Return a published state without the auxiliary training head."""
        head = _TRAINING_HEADS.get(spec.architecture.partition(".")[0])
        return state if head is None else {k: v for k, v in state.items() if not k.startswith(head)}

    def pretrained(self, spec: ModelSpec) -> Pretrained:
        """Load the pretrained weights with timm, from its cache or from the network.

        Raises:
            InputError: there are no weights, they contain no classifier, or the download failed.
        """
        configuration = _configuration(spec)
        if not configuration.has_weights:
            raise InputError(f"{spec} has no pretrained weights; pass --weights FILE.safetensors")
        if configuration.num_classes == 0:
            raise InputError(f"the pretrained weights of {spec} contain no classifier; choose another tag")
        try:
            model = _create(spec, pretrained=True, **_hub_source(configuration.hf_hub_id))
        except OSError as error:
            raise download_error(spec, error) from error
        name = f"{configuration.architecture}.{configuration.tag}".rstrip(".")
        return Pretrained(name, dict(model.state_dict()))


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    """Return timm's `feature_info`: module, num_chs and reduction of each feature map; empty if there is none."""
    info: Any = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates"):
        return []
    return [dict(entry) for entry in getattr(info, "info", info)]


def _intermediate_maps(model: nn.Module, input_size: tuple[int, int]) -> list[torch.Tensor]:
    """Return timm's own feature maps (1,C,h,w) of the random image that `capture_outputs` uses."""
    forward: Any = model.forward_intermediates
    try:
        with eval_mode(model):
            return list(forward(random_image(input_size), intermediates_only=True))
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise InputError(
            f"the stages of {type(model).__name__} cannot be determined ({error}); use --embedding-tap pooled"
        ) from error


def _verified_stage(
    name: str, entry: dict[str, Any], output: torch.Tensor | None, features: torch.Tensor
) -> FeatureStage | None:
    """Return the stage with the layout in which pooling `output` equals pooling timm's own map; None if none does."""
    if output is None or features.ndim != 4:
        return None
    _, channels, height, width = features.shape
    prefix = output.shape[1] - height * width if output.ndim == 3 else 0
    layouts: tuple[Layout, ...] = ("tokens",) if output.ndim == 3 else ("NCHW", "NHWC")
    expected = features.float().mean((2, 3))
    for layout in layouts:
        stage = FeatureStage(name, entry["module"], layout, channels, entry["reduction"], prefix)
        if output.ndim in (3, 4) and prefix >= 0 and _is_close(stage.pool(output), expected):
            return stage
    return None


def _is_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _configuration(spec: ModelSpec) -> Any:
    return timm.models.get_pretrained_cfg(spec.architecture) or timm.models.PretrainedCfg()


def _create(spec: ModelSpec, **options: object) -> nn.Module:
    refuse_reserved(spec, _RESERVED)
    create: Any = timm.create_model
    try:
        with repeatable_initialization():
            model: nn.Module = create(spec.architecture, **options, **spec.arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise bad_arguments(spec, error) from error
    return model


def _data_arguments(spec: ModelSpec, overrides: PreprocessingOverrides) -> dict[str, object]:
    """Return the user's settings for `resolve_data_config`; an `img_size` of the network is also the input size."""
    side = spec.arguments.get("img_size")
    sides = overrides.input_size or (None if side is None else (side, side))
    return {"crop_pct": overrides.crop_pct, "input_size": None if sides is None else (3, *sides)}


def _hub_source(repository: str | None) -> dict[str, object]:
    """Return the options with which timm loads a cached file without a request. Raises OSError if offline."""
    if not repository:
        return {}
    cached = huggingface_hub.try_to_load_from_cache(repository, _HUB_FILE)
    if isinstance(cached, str):
        return {"pretrained_cfg_overlay": {"file": cached}}
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set and the weights are not in the cache")
    require_reachable(f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{_HUB_FILE}")
    return {}
