"""Layer depths and weight decay exemptions, for every torchvision family and in comparison with timm."""

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision import models as torchvision_models

from batchcls.errors import InputError
from batchcls.models.layers import exempt_from_weight_decay, layer_depths
from batchcls.training.optimizer import make_optimizer
from batchcls.training.recipe import Recipe, read_recipe


def torchvision_network(name: str) -> nn.Module:
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    # RegNet computes its widths with tensors, which must not be on the meta device.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return torchvision_models.get_model(name, weights=None, **options)


def timm_network(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def recipe(**changes: object) -> Recipe:
    return read_recipe("fine-tune").with_changes(
        **({"learning_rate": 1.0, "head_learning_rate": 7.0, "layer_decay": 0.5} | changes)
    )


# By name: number of layers including the classifier, and the expected depth of parameters (None: the last).
TORCHVISION = {
    "resnet50": (18, {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.downsample.0.weight": 1, "layer1.2.conv1.weight": 3,
                      "layer4.2.bn3.weight": 16, "fc.weight": 17}),
    "mobilenet_v3_large": (19, {"features.0.0.weight": 0, "features.0.1.bias": 0, "features.1.block.0.0.weight": 1,
                                "features.16.1.weight": 16, "classifier.0.weight": 17, "classifier.3.bias": 18}),
    "efficientnet_b0": (19, {"features.0.1.weight": 0, "features.1.0.block.0.0.weight": 1,
                             "features.7.0.block.0.0.weight": 16, "features.8.0.weight": 17, "classifier.1.bias": 18}),
    "convnext_tiny": (23, {"features.0.0.weight": 0, "features.1.0.layer_scale": 1, "features.1.2.block.0.bias": 3,
                           "features.2.0.weight": 3, "features.2.1.weight": 4, "features.7.2.layer_scale": 21,
                           "classifier.0.weight": 21, "classifier.2.weight": 22}),
    "swin_t": (17, {"features.0.0.weight": 0, "features.0.2.weight": 0,
                    "features.1.0.attn.relative_position_bias_table": 1, "features.2.reduction.weight": 3,
                    "features.7.1.mlp.0.weight": 15, "norm.weight": 15, "head.weight": 16}),
    "vit_b_16": (14, {"class_token": 0, "conv_proj.weight": 0, "encoder.pos_embedding": 0,
                      "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": 1,
                      "encoder.layers.encoder_layer_11.mlp.3.bias": 12, "encoder.ln.weight": 12,
                      "heads.head.weight": 13}),
    "maxvit_t": (15, {"stem.0.0.weight": 0, "stem.1.0.weight": 1,
                      "blocks.0.layers.0.layers.MBconv.layers.conv_a.0.weight": 2,
                      "blocks.3.layers.1.layers.grid_attention.mlp_layer.3.bias": 12, "classifier.5.weight": None}),
    "densenet121": (63, {"features.conv0.weight": 0, "features.denseblock1.denselayer1.conv1.weight": 1,
                         "features.transition1.conv.weight": 7, "classifier.weight": None}),
    "regnet_y_400mf": (18, {"stem.0.weight": 0, "trunk_output.block1.block1-0.f.a.0.weight": 1, "fc.weight": None}),
    "inception_v3": (17, {"Conv2d_1a_3x3.conv.weight": 0, "Mixed_5b.branch1x1.conv.weight": 5, "fc.weight": None}),
    "googlenet": (13, {"conv1.conv.weight": 0, "inception3a.branch1.conv.weight": 3, "fc.weight": None}),
    "shufflenet_v2_x1_0": (19, {"conv1.0.weight": 0, "stage2.0.branch1.0.weight": 1, "fc.weight": None}),
    "mnasnet1_0": (21, {"layers.0.weight": 0, "layers.8.0.layers.0.weight": 3, "classifier.1.weight": None}),
    "mobilenet_v2": (20, {"features.0.0.weight": 0, "features.18.0.weight": 18, "classifier.1.weight": 19}),
    "vgg11_bn": (11, {"features.0.weight": 0, "features.1.weight": 0, "features.4.weight": 1, "classifier.6.bias": 10}),
    "alexnet": (8, {"features.0.weight": 0, "classifier.6.weight": 7}),
    "squeezenet1_0": (10, {"features.0.weight": 0, "features.3.squeeze.weight": 1, "classifier.1.weight": 9}),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_layer_decay_of_torchvision_networks(name: str):
    model, (layers, expected) = torchvision_network(name), TORCHVISION[name]
    depths = layer_depths(model)
    assert list(depths.values()) == sorted(depths.values())
    assert set(depths.values()) == set(range(layers))
    assert depths.keys() == dict(model.named_parameters()).keys()
    assert {part: depths[part] for part in expected} == {
        part: layers - 1 if depth is None else depth for part, depth in expected.items()
    }
    head = list(depths)[-1].rpartition(".")[0]
    peaks = peaks_of(model, head)
    assert peaks == {
        part: 7.0 if part.startswith(f"{head}.") else 0.5 ** (layers - 1 - depth)
        for part, depth in depths.items()
    }


def test_every_torchvision_family_is_tested():
    def family(name: str) -> str:
        return re.match(r"wide_resnet|resnext|[a-z]+(?:_v\d)?", name).group()

    same = {"wide_resnet": "resnet", "resnext": "resnet", "swin_v": "swin", "efficientnet_v2": "efficientnet"}
    families = {family(name) for name in torchvision_models.list_models(module=torchvision_models)}
    tested = {family(name) for name in TORCHVISION}
    assert {same.get(name, name) for name in families} - tested <= {"swin_v2"}


def peaks_of(model: nn.Module, head: str) -> dict[str, float]:
    optimizer = make_optimizer(model, [head], recipe())
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(value)]: group["peak"] for group in optimizer.param_groups for value in group["params"]}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet50", "fc"), ("mobilenetv3_large_100", "classifier"), ("efficientnet_b0", "classifier"),
        ("convnext_tiny", "head.fc"), ("swin_tiny_patch4_window7_224", "head.fc"), ("vit_tiny_patch16_224", "head"),
        ("deit_tiny_distilled_patch16_224", "head"), ("caformer_s18", "head.fc.fc2"), ("pit_ti_224", "head"),
        ("mobilenetv2_100", "classifier"), ("test_vit", "head"), ("beit_base_patch16_224", "head"),
    ],
)  # fmt: skip
def test_layer_and_weight_decay_match_timm(name: str, head: str):
    model = timm_network(name)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    expected = {
        id(value): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(model, 0.05, exempt, layer_decay=0.5)
        for value in group["params"]
    }
    actual = {
        id(value): (group["peak"], group["weight_decay"])
        for group in make_optimizer(model, [head], recipe()).param_groups
        for value in group["params"]
    }
    for part, value in model.named_parameters():
        if part.startswith(f"{head}."):
            assert actual.pop(id(value)) == (7.0, expected.pop(id(value))[1])
    assert actual == expected


def test_parameters_that_the_network_names_are_exempt_from_weight_decay():
    def long(model: nn.Module) -> set[str]:
        named = dict(model.named_parameters())
        return {name for name in exempt_from_weight_decay(model) if named[name].ndim > 1}

    assert long(timm_network("vit_tiny_patch16_224")) == {"cls_token", "pos_embed"}
    assert long(torchvision_network("vit_b_16")) == {"class_token", "encoder.pos_embedding"}
    swin = long(torchvision_network("swin_t"))
    assert len(swin) == 12
    assert {name.rpartition(".")[2] for name in swin} == {"relative_position_bias_table"}
    assert len(long(torchvision_network("convnext_tiny"))) == 18
    assert len(long(torchvision_network("swin_v2_t"))) == 12
    assert long(torchvision_network("resnet50")) == set()


def test_network_with_unknown_layers_requires_layer_decay_one():
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = timm_network("test_resnet")

    with pytest.raises(InputError, match=r"order of the layers of Opaque is not known.*layer_decay = 1"):
        make_optimizer(Opaque(), ["body.fc"], recipe())
    optimizer = make_optimizer(Opaque(), ["body.fc"], recipe(layer_decay=1.0))
    assert {group["peak"] for group in optimizer.param_groups} == {1.0, 7.0}
