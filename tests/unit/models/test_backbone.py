import pytest
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.feature_taps import find_tap
from batchcls.models.sources import find_model, get_library
from tests.helpers.tiers import long_except

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 7

ARGUMENTS = {"torchvision:vit_b_16": {"image_size": 32}}

# Their heads read the feature map instead of the embedding: SqueezeNet classifies each position, and timm splits LeViT.
HEADS_ON_FEATURES = {"torchvision:squeezenet1_1", "timm:levit_128"}

# One architecture for each kind of classifier in the libraries, with a small input size.
ARCHITECTURES = [
    ("torchvision:alexnet", 64),
    ("torchvision:convnext_tiny", 64),
    ("torchvision:densenet121", 64),
    ("torchvision:efficientnet_b0", 64),
    ("torchvision:efficientnet_v2_s", 64),
    ("torchvision:googlenet", 64),
    ("torchvision:inception_v3", 80),
    ("torchvision:mnasnet0_5", 64),
    ("torchvision:mobilenet_v2", 64),
    ("torchvision:mobilenet_v3_small", 64),
    ("torchvision:regnet_y_400mf", 64),
    ("torchvision:resnet18", 64),
    ("torchvision:shufflenet_v2_x0_5", 64),
    ("torchvision:squeezenet1_1", 64),
    ("torchvision:swin_t", 64),
    ("torchvision:vgg11", 32),
    ("torchvision:vit_b_16", 32),
    ("timm:convnext_atto", 64),
    ("timm:convnextv2_atto", 64),
    ("timm:dla46x_c", 64),
    ("timm:efficientnet_lite0", 64),
    ("timm:mobilenetv1_100", 64),
    ("timm:mobilenetv2_100", 64),
    ("timm:mobilenetv3_small_050", 64),
    ("timm:regnetx_002", 64),
    ("timm:repvit_m1", 64),
    ("timm:resnetv2_18", 64),
    ("timm:crossvit_tiny_240", 240),
    ("timm:deit_tiny_distilled_patch16_224", 224),
    ("timm:efficientvim_m1", 64),
    ("timm:levit_128", 224),
    ("timm:tf_efficientnet_lite0", 64),
    ("timm:vit_tiny_patch16_224", 224),
]
# Kinds of networks that the backbone treats differently.
DIFFERENT = {
    *(
        "torchvision:densenet121",
        "torchvision:googlenet",
        "torchvision:resnet18",
        "torchvision:squeezenet1_1",
    ),
    *("torchvision:swin_t", "torchvision:vgg11", "timm:mobilenetv2_100", "timm:mobilenetv3_small_050"),
    *("timm:deit_tiny_distilled_patch16_224", "timm:crossvit_tiny_240", "timm:levit_128"),
}


def _model(name: str, arguments=None) -> tuple[nn.Module, tuple[str, ...]]:
    spec = find_model(name, arguments or ARGUMENTS.get(name, {}))
    model = get_library(spec).build(spec, CLASSES).eval()
    return model, get_library(spec).classifiers(model)


def _images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def _spread_statistics(model: nn.Module) -> None:
    """Set different statistics in every BatchNorm layer, as training does."""
    generator = torch.Generator().manual_seed(3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.1, 0.1, generator=generator)
            part.running_var.uniform_(0.8, 1.2, generator=generator)


@pytest.mark.parametrize(("name", "side"), long_except(DIFFERENT, ARCHITECTURES))
def test_logits_match_the_full_network_and_embedding_is_returned(name, side):
    model, classifiers = _model(name)
    _spread_statistics(model)
    images = _images(2, side)
    with torch.inference_mode():
        expected = model(images)
        backbone = Backbone(model, classifiers, (side, side))
        logits, embedding = backbone(images)
        if name not in HEADS_ON_FEATURES:
            torch.testing.assert_close(backbone.head(embedding), logits)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.shape == (2, CLASSES) == (2, backbone.classes)
    assert embedding.shape == (2, backbone.dimension)
    assert logits.dtype == embedding.dtype == torch.float32
    assert not torch.equal(embedding[0], embedding[1])


def test_squeezenet_embedding_is_the_mean_feature_map():
    model, classifiers = _model("torchvision:squeezenet1_1")
    features = model.features(_images(2, 64)).detach()
    _, embedding = Backbone(model, classifiers, (64, 64))(_images(2, 64))
    torch.testing.assert_close(embedding, features.mean((2, 3)))
    assert embedding.shape == (2, 512)


def test_weighted_sum_of_classifiers_with_biases_is_preserved():
    model, classifiers = _model("timm:efficientvim_m1")
    assert len(classifiers) == 4
    widths = sum(model.get_submodule(path).in_features for path in classifiers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.weights.copy_(torch.tensor([0.1, 2.0, -1.0, 0.5]))
        for path in classifiers:
            model.get_submodule(path).bias.normal_(generator=generator)
        expected = model(_images(3, 64))
        logits, embedding = Backbone(model, classifiers, (64, 64))(_images(3, 64))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert embedding.shape[1] == widths


@pytest.mark.parametrize("tap", ["pooled", "stage2"])
@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:mobilenet_v3_small"])
def test_outputs_are_independent_of_batching_and_buffers_do_not_change(name, tap):
    model, classifiers = _model(name)
    _spread_statistics(model.train())
    before = {key: value.clone() for key, value in model.named_buffers()}
    spec = find_model(name, {})
    stage = find_tap(spec, model, get_library(spec), tap, (64, 64))
    backbone = Backbone(model, classifiers, (64, 64), stage)
    images = _images(7, 64)
    one_batch = backbone(images)
    batches = [backbone(batch) for batch in images.split([1, 4, 2])]
    for outputs, expected in zip(zip(*batches, strict=True), one_batch, strict=True):
        assert expected.std(0).max() > 0
        scale = float(expected.abs().max())
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=0, atol=1e-5 * scale)
    after = dict(model.named_buffers())
    assert len(before) > 10
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_backbone_is_frozen_and_in_eval_mode():
    model, classifiers = _model("torchvision:resnet18")
    backbone = Backbone(model.train(), classifiers, (64, 64))
    assert not any(part.training for part in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_train_raises_and_keeps_eval_mode():
    model, classifiers = _model("timm:mobilenetv3_small_050")
    backbone = Backbone(model, classifiers, (64, 64))
    with pytest.raises(RuntimeError, match="stays in eval mode"):
        backbone.train()
    assert not any(part.training for part in backbone.modules())
    assert backbone.eval() is backbone


def test_head_stays_in_float32_under_autocast():
    model, classifiers = _model("torchvision:resnet18")
    backbone = Backbone(model, classifiers, (64, 64))
    with torch.inference_mode():
        exact, _ = backbone(_images(2, 64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, embedding = backbone(_images(2, 64))
        torch.testing.assert_close(backbone.head(embedding), logits)
    assert logits.dtype == embedding.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.05)


def test_unsupported_image_size_is_rejected():
    model, classifiers = _model("timm:vit_tiny_patch16_224")
    with pytest.raises(InputError, match=r"does not accept images of 64 x 64 pixels.*--input-size"):
        Backbone(model, classifiers, (64, 64))


class _Squared(nn.Module):
    """A classifier with an operation after its last layer, which the split cannot reproduce."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(images).flatten(1)) ** 2


class _Grouped(nn.Module):
    """A classifier whose last layer is not a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(3, 6, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "classifiers", "message"),
    [
        (_Squared, ("fc",), "does not return the logits of the full network"),
        (_Grouped, ("fc",), "is a Conv2d, not a linear layer"),
        (_Squared, (), "does not name its classifier"),
    ],
)
def test_network_that_cannot_be_split_is_rejected(model, classifiers, message):
    with pytest.raises(InputError, match=message):
        Backbone(model(), classifiers, (8, 8))


def test_network_without_logits_is_rejected():
    with pytest.raises(InputError, match="is not a classifier"):
        Backbone(nn.Sequential(nn.Conv2d(3, 4, 1)), ("0",), (8, 8))


def test_weights_with_nan_outputs_are_rejected():
    model = _Squared()
    nn.init.constant_(model.fc.weight, float("nan"))
    with pytest.raises(InputError, match="NaN or infinity"):
        Backbone(model, ("fc",), (8, 8))
