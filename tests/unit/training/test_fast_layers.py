"""Fused convolutions and norms compute the same outputs and gradients, and other layers remain as they are."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from batchcls.training.fast_layers import fuse_frozen_norms, use_out_of_place_activations
from batchcls.training.optimizer import set_training_mode

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (64, 64)


def with_statistics(model: nn.Module) -> nn.Module:
    """Give all norms statistics and factors like those of a trained network, and return the network."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    return model


def gradients(model: nn.Module, size: tuple[int, int] = SIZE) -> dict[str, torch.Tensor]:
    set_training_mode(model, "frozen")
    images = torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same_gradients(model: nn.Module, fused: nn.Module) -> None:
    expected, actual = gradients(model), gradients(fused)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-2, atol=1e-4 * float(value.abs().max())), name
    states = model.state_dict(), fused.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("model", "pairs"),
    [
        (lambda: timm.create_model("mobilenetv2_035", num_classes=5, pad_type="same"), 52),
        (lambda: timm.create_model("test_resnet", num_classes=5), 15),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5, dropout=0.0), 34),
        (lambda: torchvision.models.resnet18(num_classes=5), 20),
    ],
    ids=["timm mobilenetv2", "timm resnet", "torchvision mobilenet_v3", "torchvision resnet"],
)
def test_fused_network_has_the_same_gradients(model, pairs: int):
    torch.manual_seed(0)
    plain = with_statistics(model())
    fused = copy.deepcopy(plain)
    assert fuse_frozen_norms(fused, SIZE) == pairs
    use_out_of_place_activations(fused)
    assert_same_gradients(plain, fused)


def test_copy_of_a_fused_network_uses_its_own_weights():
    torch.manual_seed(0)
    fused = with_statistics(timm.create_model("test_resnet", num_classes=5))
    fuse_frozen_norms(fused, SIZE)
    copied = copy.deepcopy(fused)
    images = torch.randn(2, 3, *SIZE)
    before = copied.eval()(images)
    with torch.no_grad():
        for value in fused.parameters():
            value.zero_()
    assert torch.equal(copied(images), before)


class Block(nn.Module):
    """A convolution and a norm, used in a way that does or does not allow fusing them."""

    def __init__(self, norm: nn.Module, use: str = "once") -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.norm, self.use = norm, use
        self.again = nn.Conv2d(5, 3, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.first(images)
        result = self.norm(features)
        if self.use == "output twice":
            result = result + features
        if self.use == "norm twice":
            result = self.norm(result)
        if self.use == "convolution twice":
            result = result + self.first(self.again(result))
        return result.mean((2, 3))


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("norm", "use", "pairs"),
    [
        (lambda: nn.BatchNorm2d(5), "once", 1),
        (lambda: nn.BatchNorm2d(5, affine=False), "once", 1),
        (lambda: BatchNormAct2d(5, act_layer=nn.SiLU), "once", 1),
        (lambda: nn.BatchNorm2d(5), "output twice", 0),
        (lambda: nn.BatchNorm2d(5), "norm twice", 0),
        (lambda: nn.BatchNorm2d(5), "convolution twice", 0),
        (lambda: DoubledNorm(5), "once", 0),
        (lambda: nn.BatchNorm2d(5, track_running_stats=False), "once", 0),
        (lambda: nn.GroupNorm(1, 5), "once", 0),
    ],
)
def test_only_a_norm_that_alone_uses_a_convolution_is_fused(norm, use: str, pairs: int):
    torch.manual_seed(0)
    plain = with_statistics(Block(norm(), use))
    fused = copy.deepcopy(plain)
    assert fuse_frozen_norms(fused, SIZE) == pairs
    assert_same_gradients(plain, fused)


def test_relu_stays_in_place():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.SiLU(inplace=True))
    use_out_of_place_activations(model)
    assert [module.inplace for module in model] == [True, False, False]
