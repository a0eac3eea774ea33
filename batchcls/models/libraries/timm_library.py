"""The library timm: its architectures, its configurations, its weights."""

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
    make_preprocessing,
    no_download,
    refuse_reserved,
    repeatable_initialization,
    require_reachable,
)
from batchcls.models.model_spec import ModelSpec, PreprocessingOverrides
from batchcls.models.weights import State
from batchcls.preprocessing import Preprocessing

_RESERVED = {
    "num_classes": "the number of classes follows from the weights, or from --labels; leave it out",
    "in_chans": "images here have three channels; leave it out",
    "features_only": "a classifier is needed; leave it out",
    "pretrained": "weights are downloaded when --weights is not given; leave it out",
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
        """Whether the architecture exists. Raises InputError for an unknown tag of a known one."""
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
        """The spec itself: timm keeps what its weights ask for under the name and tag."""
        return spec

    def build(self, spec: ModelSpec, classes: int | None, dropout: float | None = None) -> nn.Module:
        """The architecture with random weights; see `Library.build`.

        Dropout is timm's `drop_rate`, which is the one in front of the classifier.
        """
        if dropout is not None:
            arguments = {**spec.arguments, "drop_rate": check_dropout(dropout)}
            spec = ModelSpec(spec.source, spec.architecture, arguments)
        return _create(spec, pretrained=False, num_classes=classes)

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the modules, almost always one, that turn features into logits."""
        configuration: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        named = configuration.get("classifier") or ()
        return (named,) if isinstance(named, str) else tuple(named)

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """The maps that `features_only=True` gives, each where the network hands it on.

        timm's record of a network names a module for each map. A module counts as a stage if what
        it gives for a random image, averaged, is timm's own answer; some records name what does
        not run, or a part of a map.
        """
        recorded = _recorded_stages(model)
        known = dict(model.named_modules())
        paths = {str(entry["module"]) for entry in recorded} & known.keys() - {""}
        outputs = dict(capture_outputs(model, paths, input_size))
        maps = _intermediate_maps(model, input_size) if outputs else []
        if len(maps) != len(recorded):
            return ()
        stages = (
            _proven_stage(f"stage{number}", entry, outputs.get(entry["module"]), features)
            for number, (entry, features) in enumerate(zip(recorded, maps, strict=True), start=1)
        )
        return tuple(stage for stage in stages if stage is not None)

    def preprocessing(self, spec: ModelSpec, overrides: PreprocessingOverrides) -> Preprocessing:
        """What timm's own evaluation does with the architecture's published weights."""
        resolve: Any = resolve_data_config
        found = resolve(_data_arguments(spec, overrides), _configuration(spec).to_dict())
        _, height, width = found["input_size"]
        values = {
            "input_height": height,
            "input_width": width,
            "resize_height": math.floor(height / found["crop_pct"]),
            "resize_width": math.floor(width / found["crop_pct"]),
            **{name: found[name] for name in ("crop_mode", "interpolation", "mean", "std")},
        }
        return make_preprocessing(str(spec), values, overrides)

    def adapt(self, spec: ModelSpec, state: State) -> State:
        """A published state without the head that is used in training only."""
        head = _TRAINING_HEADS.get(spec.architecture.partition(".")[0])
        return state if head is None else {k: v for k, v in state.items() if not k.startswith(head)}

    def pretrained(self, spec: ModelSpec) -> Pretrained:
        """Download the published weights through timm, or take them from its cache.

        Raises:
            InputError: there are none, they hold no classifier, or the network does not answer.
        """
        configuration = _configuration(spec)
        if not configuration.has_weights:
            raise InputError(f"{spec} has no published weights; pass --weights FILE.safetensors")
        if configuration.num_classes == 0:
            raise InputError(f"the published weights of {spec} hold no classifier; choose another tag")
        try:
            model = _create(spec, pretrained=True, **_hub_source(configuration.hf_hub_id))
        except OSError as error:
            raise no_download(spec, error) from error
        name = f"{configuration.architecture}.{configuration.tag}".rstrip(".")
        return Pretrained(name, dict(model.state_dict()))


def _recorded_stages(model: nn.Module) -> list[dict[str, Any]]:
    """timm's `feature_info`: module, num_chs and reduction of each map; nothing where it has none."""
    info: Any = getattr(model, "feature_info", None)
    if info is None or not hasattr(model, "forward_intermediates"):
        return []
    return [dict(entry) for entry in getattr(info, "info", info)]


def _intermediate_maps(model: nn.Module, input_size: tuple[int, int]) -> list[torch.Tensor]:
    """timm's own feature maps (1,C,h,w) of the image that `capture_outputs` shows."""
    forward: Any = model.forward_intermediates
    try:
        with eval_mode(model):
            return list(forward(random_image(input_size), intermediates_only=True))
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
        raise InputError(
            f"the stages of {type(model).__name__} cannot be found ({error}); use --embedding-tap pooled"
        ) from error


def _proven_stage(
    name: str, entry: dict[str, Any], output: torch.Tensor | None, features: torch.Tensor
) -> FeatureStage | None:
    """The stage whose mean over `output` is that over timm's own map, in whatever layout; else None."""
    if output is None or features.ndim != 4:
        return None
    _, channels, height, width = features.shape
    prefix = output.shape[1] - height * width if output.ndim == 3 else 0
    layouts: tuple[Layout, ...] = ("tokens",) if output.ndim == 3 else ("NCHW", "NHWC")
    expected = features.float().mean((2, 3))
    for layout in layouts:
        stage = FeatureStage(name, entry["module"], layout, channels, entry["reduction"], prefix)
        if output.ndim in (3, 4) and prefix >= 0 and _same(stage.pool(output), expected):
            return stage
    return None


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


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
    """What timm's resolution takes from the user: an `img_size` of the network is one of the input."""
    side = overrides.input_size or spec.arguments.get("img_size")
    return {"crop_pct": overrides.crop_pct, "input_size": None if side is None else (3, side, side)}


def _hub_source(repository: str | None) -> dict[str, object]:
    """Options that make timm load a cached file without asking the hub; raises OSError offline."""
    if not repository:
        return {}
    cached = huggingface_hub.try_to_load_from_cache(repository, _HUB_FILE)
    if isinstance(cached, str):
        return {"pretrained_cfg_overlay": {"file": cached}}
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set and the weights are not in the cache")
    require_reachable(f"{huggingface_hub.constants.ENDPOINT}/{repository}/resolve/main/{_HUB_FILE}")
    return {}
