import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models

from batchcls.models.backbone import Backbone
from batchcls.models.flops import ModelCost, count_cost

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cost_of_convolution_and_linear_layer():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 20, 5)
    )
    parameters = (8 * 27 + 8) + 2 * 8 + (5 * 160 + 5)
    assert count_cost(network.eval(), (4, 5)) == ModelCost(parameters, 20 * 8 * 27 + 160 * 5)


@pytest.mark.parametrize("fast_path", [True, False])
def test_attention_is_counted_and_fast_path_setting_is_restored(fast_path):
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
        network = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.Flatten(2), _Transpose(), layer).eval()
        cost = count_cost(network, (12, 12))
        assert torch.backends.mha.get_fastpath_enabled() is fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    tokens, width, hidden = 9, 16, 32
    patches = tokens * width * 3 * 4 * 4
    attention = tokens * width * 4 * width + 2 * tokens * tokens * width
    assert cost.multiply_adds == patches + attention + 2 * tokens * width * hidden


class _Transpose(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.transpose(1, 2)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_meta_device_gives_the_same_cost(name):
    real = timm.create_model(name).eval()
    with torch.device("meta"):
        meta = timm.create_model(name).eval()
    assert count_cost(real, (160, 160)) == count_cost(meta, (160, 160))


def test_backbone_has_the_cost_of_its_network():
    network = torchvision_models.squeezenet1_1().eval()
    expected = count_cost(network, (64, 64))
    assert count_cost(Backbone(network, ("classifier.1",), (64, 64)), (64, 64)) == expected


def test_network_in_training_mode_is_rejected_without_changing_statistics():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        count_cost(network.train(), (2, 2))
    assert int(network[1].num_batches_tracked) == 0
    before = network.eval()[1].running_mean.clone()
    count_cost(network, (2, 2))
    assert torch.equal(network[1].running_mean, before)
