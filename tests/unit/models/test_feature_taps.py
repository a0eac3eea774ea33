import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.feature_taps import FeatureStage, FeatureTap, capture_outputs, find_tap, random_image
from batchcls.models.sources import LIBRARIES, find_model, get_library

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_weights")


def _model(name: str, classes: int | None = 5, **arguments) -> nn.Module:
    spec = find_model(name, arguments)
    return get_library(spec).build(spec, classes).eval()


def _stages(name: str, model: nn.Module, side: int) -> tuple[FeatureStage, ...]:
    return LIBRARIES[name.partition(":")[0]].stages(model, (side, side))


def _tap(name: str, model: nn.Module, tap: str, side: int) -> FeatureStage | None:
    spec = find_model(name, {})
    return find_tap(spec, model, get_library(spec), tap, (side, side))


def _backbone(name: str, model: nn.Module, side: int, tap: FeatureStage | None) -> Backbone:
    classifiers = LIBRARIES[name.partition(":")[0]].classifiers(model)
    return Backbone(copy.deepcopy(model), classifiers, (side, side), tap)


def _images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def _tapped(model: nn.Module, stages: tuple[FeatureStage, ...], images: torch.Tensor) -> list[torch.Tensor]:
    """Return the embeddings of all stages in one forward pass."""
    taps = [FeatureTap(model, stage) for stage in stages]
    with torch.inference_mode():
        model(images)
    return [tap.take() for tap in taps]


def _plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes and separators of timm's feature extractors."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")


def _features_only(name: str, model: nn.Module) -> nn.Module:
    """Return timm's feature extractor with the weights of `model`."""
    count = len(model.feature_info)
    extractor = timm.create_model(name, features_only=True, out_indices=tuple(range(count)))
    state = {_plain_name(key): value for key, value in model.state_dict().items()}
    extractor.load_state_dict({key: state[_plain_name(key)] for key in extractor.state_dict()})
    return extractor.eval()


@pytest.mark.parametrize(
    ("name", "side", "layout", "count"),
    [
        ("test_resnet", 64, "NCHW", 5),
        ("test_efficientnet", 64, "NCHW", 5),
        ("test_convnext", 64, "NCHW", 4),
        ("test_mambaout", 64, "NHWC", 4),
        ("test_vit", 160, "tokens", 6),
        ("mobilenetv1_100", 64, "NCHW", 5),
        ("tf_efficientnet_lite0", 64, "NCHW", 5),
        ("convnextv2_atto", 64, "NCHW", 4),
        ("swin_tiny_patch4_window7_224", 224, "NHWC", 4),
    ],
)
def test_timm_stages_match_features_only(name, side, layout, count):
    model = _model(f"timm:{name}")
    stages = _stages(f"timm:{name}", model, side)
    assert [stage.name for stage in stages] == [f"stage{number}" for number in range(1, count + 1)]
    assert {stage.layout for stage in stages} == {layout}
    images = _images(2, side)
    extractor = _features_only(name, model)
    with torch.inference_mode():
        maps = extractor(images)
    channels_last = str(getattr(extractor, "output_fmt", "")).endswith("NHWC")
    for stage, features, found in zip(stages, maps, _tapped(model, stages, images), strict=True):
        expected = features.mean((1, 2) if channels_last else (2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found.shape == (2, stage.channels)
        assert found.std() > 0


@pytest.mark.parametrize(("name", "prefix"), [("test_vit", 1), ("cait_xxs24_224", 0)])
def test_only_prefix_tokens_are_skipped(name, prefix):
    """Like a ViT, CaiT has a class token, but it is added after the stages."""
    model = _model(f"timm:{name}")
    stages = _stages(f"timm:{name}", model, model.pretrained_cfg["input_size"][1])
    assert {stage.prefix for stage in stages} == {prefix}


TORCHVISION = [
    ("resnet18", 64, ["relu", "layer1", "layer2", "layer3", "layer4"]),
    ("vgg11", 32, ["features.1", "features.4", "features.9", "features.14", "features.19", "features"]),
    ("mobilenet_v3_small", 64, ["features.0", "features.1", "features.3", "features.8", "features"]),
    (
        "densenet121",
        64,
        [
            "features.relu0",
            "features.denseblock1",
            "features.denseblock2",
            "features.denseblock3",
            "features",
        ],
    ),
    ("googlenet", 64, ["conv1", "conv3", "inception3b", "inception4e", "inception5b"]),
    ("inception_v3", 96, ["Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"]),
    (
        "regnet_y_400mf",
        64,
        ["stem", "trunk_output.block1", "trunk_output.block2", "trunk_output.block3", "trunk_output"],
    ),
    ("convnext_tiny", 64, ["features.1", "features.3", "features.5", "features"]),
    ("swin_t", 64, ["features.1", "features.3", "features.5", "features"]),
    ("efficientnet_b0", 64, ["features.1", "features.2", "features.3", "features.5", "features"]),
    ("squeezenet1_1", 64, ["features.1", "features.4", "features.7", "features"]),
]


@pytest.mark.parametrize(("name", "side", "paths"), TORCHVISION)
def test_torchvision_stages_match_its_feature_extractor(name, side, paths):
    model = _model(f"torchvision:{name}")
    stages = _stages(f"torchvision:{name}", model, side)
    assert [stage.path for stage in stages] == paths
    assert {stage.layout for stage in stages} == {"NHWC" if name == "swin_t" else "NCHW"}
    images = _images(2, side)
    extractor = create_feature_extractor(model, {stage.path: stage.name for stage in stages})
    with torch.inference_mode():
        maps = extractor(images)
    for stage, found in zip(stages, _tapped(model, stages, images), strict=True):
        expected = maps[stage.name].mean((1, 2) if name == "swin_t" else (2, 3))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found.shape == (2, stage.channels)


def test_torchvision_vit_stages_are_means_of_patch_tokens():
    model = _model("torchvision:vit_b_16", image_size=32)
    stages = _stages("torchvision:vit_b_16", model, 32)
    assert len(stages) == 12
    images = _images(2, 32)
    extractor = create_feature_extractor(model, {stage.path: stage.name for stage in stages})
    with torch.inference_mode():
        maps = extractor(images)
    for stage, found in zip(stages, _tapped(model, stages, images), strict=True):
        assert maps[stage.name].shape == (2, 1 + 2 * 2, 768)
        torch.testing.assert_close(found, maps[stage.name][:, 1:].mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reductions"),
    [
        ("torchvision:resnet18", [2, 4, 8, 16, 32]),
        ("torchvision:alexnet", [4, 8, 16, 32]),
        ("timm:test_resnet", [2, 4, 8, 16, 32]),
    ],
)
def test_reduction_of_stages(name, reductions):
    model = _model(name)
    assert [stage.reduction for stage in _stages(name, model, 224)] == reductions


def test_torchvision_and_timm_agree_on_stages_of_inception_v3():
    ours = _stages("torchvision:inception_v3", _model("torchvision:inception_v3"), 299)
    recorded = timm.create_model("inception_v3").feature_info
    assert [(s.path, s.channels, s.reduction) for s in ours] == [
        (entry["module"], entry["num_chs"], entry["reduction"]) for entry in recorded
    ]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("timm:test_resnet", 64),
        ("timm:test_vit", 160),
        ("torchvision:squeezenet1_1", 64),
        ("torchvision:swin_t", 64),
    ],
)
def test_tapped_backbone_returns_logits_and_stage_in_one_pass(name, side):
    model = _model(name)
    tap = _tap(name, model, "stage2", side)
    images = _images(3, side)
    (expected,) = _tapped(copy.deepcopy(model), (tap,), images)
    backbone, plain = _backbone(name, model, side, tap), _backbone(name, model, side, None)
    passes = []
    backbone.trunk.register_forward_hook(lambda *_: passes.append(1))
    with torch.inference_mode():
        logits, embedding = backbone(images)
        assert len(passes) == 1
        torch.testing.assert_close(logits, plain(images)[0])
        torch.testing.assert_close(embedding, expected)
        assert embedding.dtype == torch.float32
        assert embedding.shape == (3, backbone.dimension) == (3, tap.channels)
        one, _ = backbone(images[:1])[1], backbone(images)
        torch.testing.assert_close(one, embedding[:1], rtol=1e-4, atol=1e-5)


def test_stage_is_pooled_in_float32_under_autocast():
    name = "timm:test_resnet"
    model = _model(name)
    tap = _tap(name, model, "stage3", 64)
    backbone = _backbone(name, model, 64, tap)
    seen = []
    backbone.trunk.get_submodule(tap.path).register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, embedding = backbone(_images(2, 64))
    assert seen[0].dtype == torch.bfloat16
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, seen[0].float().mean((2, 3)))


@pytest.mark.parametrize("tap", ["pooled", "stage2"])
def test_backbone_can_be_exported_for_any_batch_size(tap):
    name = "timm:test_resnet"
    model = _model(name)
    backbone = _backbone(name, model, 64, _tap(name, model, tap, 64))
    sizes = ({0: torch.export.Dim("images", min=1, max=64)},)
    program = torch.export.export(backbone, (_images(2, 64),), dynamic_shapes=sizes, strict=False)
    for found, expected in zip(program.module()(_images(5, 64)), backbone(_images(5, 64)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_copy_of_tapped_backbone_has_its_own_tap():
    name = "timm:test_resnet"
    model = _model(name)
    backbone = _backbone(name, model, 64, _tap(name, model, "stage1", 64))
    twin = copy.deepcopy(backbone)
    torch.testing.assert_close(twin(_images(2, 64))[1], backbone(_images(2, 64))[1])
    with torch.no_grad():
        twin.trunk.conv1[0].weight.zero_()
    assert not torch.equal(twin(_images(2, 64))[1], backbone(_images(2, 64))[1])


def test_pooled_is_not_a_stage():
    assert _tap("timm:test_resnet", _model("timm:test_resnet"), "pooled", 64) is None


@pytest.mark.parametrize(
    ("name", "side", "tap", "message"),
    [
        ("torchvision:resnet18", 64, "stage9", r"torchvision:resnet18 has stage1 to stage5 and pooled"),
        ("timm:test_convnext", 64, "stage5", r"timm:test_convnext has stage1 to stage4 and pooled"),
        ("timm:coat_tiny", 224, "stage1", r"timm:coat_tiny has no stages; choose pooled"),
        ("timm:test_resnet", 64, "stage0", r"--embedding-tap stage0: unknown.*pooled, or stage1"),
        ("timm:test_resnet", 64, "layer4", r"--embedding-tap layer4: unknown.*pooled, or stage1"),
    ],
)
def test_unknown_stage_is_rejected_with_available_stages(name, side, tap, message):
    with pytest.raises(InputError, match=message):
        _tap(name, _model(name), tap, side)


@pytest.mark.parametrize(
    ("name", "side"), [("torchvision:squeezenet1_1", 8), ("timm:swin_tiny_patch4_window7_224", 100)]
)
def test_unsupported_size_is_rejected_when_finding_stages(name, side):
    with pytest.raises(InputError, match=rf"does not accept images of {side} x {side} pixels"):
        _tap(name, _model(name), "stage1", side)


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:mobilenet_v3_small"])
def test_finding_a_stage_does_not_change_the_network(name):
    model = _model(name).train()
    model.get_submodule("bn1" if name.startswith("timm") else "features.1").eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    _tap(name, model, "stage2", 64)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_stage_of_another_network_is_rejected():
    stage = FeatureStage("stage1", "features.0", "NCHW", 16, 2)
    with pytest.raises(InputError, match=r"ResNet has no module features\.0 for stage1"):
        _backbone("timm:test_resnet", _model("timm:test_resnet"), 64, stage)


def test_stage_with_other_number_of_channels_is_rejected():
    stage = FeatureStage("stage1", "layer1", "NCHW", 16, 4)
    with pytest.raises(InputError, match=r"stage1 of ResNet has 32 channels instead of 16"):
        _backbone("timm:test_resnet", _model("timm:test_resnet"), 64, stage)


def test_stage_whose_module_does_not_run_is_rejected():
    model = _model("timm:test_resnet")
    model.spare = nn.Conv2d(3, 4, 1)
    with pytest.raises(InputError, match=r"spare did not run"):
        _backbone("timm:test_resnet", model, 64, FeatureStage("stage1", "spare", "NCHW", 4, 1))


def test_embedding_can_be_taken_once_per_pass():
    model = _model("timm:test_resnet")
    tap = FeatureTap(model, FeatureStage("stage1", "layer1", "NCHW", 32, 4))
    model(_images(1, 64))
    tap.take()
    with pytest.raises(RuntimeError, match="layer1 did not run"):
        tap.take()


def test_later_in_place_layer_does_not_change_a_stage():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with torch.no_grad():
        expected = model[0](random_image((8, 8)))
        assert expected.min() < 0
        ((path, seen),) = capture_outputs(model, ["0"], (8, 8))
        tap = FeatureTap(model, FeatureStage("stage1", "0", "NCHW", 4, 1))
        model(random_image((8, 8)))
    assert path == "0"
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(tap.take(), expected.mean((2, 3)))
