import pytest
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.heads import set_dropout, with_new_head
from batchcls.models.sources import find_model, get_library
from tests.helpers.tiers import long_except

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_weights")

CLASSES = 5
IMAGE_SIZE = {"torchvision:vit_b_16": {"image_size": 32}}

# All variants of dropout, or no dropout, in front of the classifiers of the two libraries.
ARCHITECTURES = [
    ("torchvision:alexnet", 64),
    ("torchvision:convnext_tiny", 64),
    ("torchvision:densenet121", 64),
    ("torchvision:efficientnet_b0", 64),
    ("torchvision:googlenet", 64),
    ("torchvision:inception_v3", 96),
    ("torchvision:mobilenet_v3_small", 64),
    ("torchvision:regnet_y_400mf", 64),
    ("torchvision:resnet18", 64),
    ("torchvision:shufflenet_v2_x0_5", 64),
    ("torchvision:squeezenet1_1", 64),
    ("torchvision:swin_t", 64),
    ("torchvision:vgg11", 32),
    ("torchvision:vit_b_16", 32),
    ("timm:convnext_atto", 64),
    ("timm:deit_tiny_distilled_patch16_224", 224),
    ("timm:dla46x_c", 64),
    ("timm:efficientnet_lite0", 64),
    ("timm:mobilenetv3_small_050", 64),
    ("timm:repvit_m1", 64),
    ("timm:test_resnet", 64),
    ("timm:test_vit", 160),
]
DIFFERENT = {
    *("torchvision:alexnet", "torchvision:convnext_tiny", "torchvision:googlenet", "torchvision:resnet18"),
    *("torchvision:squeezenet1_1", "timm:mobilenetv3_small_050", "timm:test_resnet", "timm:test_vit"),
}


def _build(name: str, dropout: float | None = None, classes: int | None = CLASSES):
    spec = find_model(name, IMAGE_SIZE.get(name, {}))
    library = get_library(spec)
    model = library.build(spec, classes, dropout)
    return model, library.classifiers(model)


def _images(count: int, side: int) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("name", "side"), long_except(DIFFERENT, ARCHITECTURES))
def test_dropout_applies_to_classifier_input_in_training_only(name, side):
    plain, _ = _build(name)
    model, classifiers = _build(name, dropout=1.0)
    images, bias = _images(2, side), torch.linspace(0.1, 1, CLASSES)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=0, atol=0)
        for path in classifiers:
            model.get_submodule(path).bias.copy_(bias)
        torch.testing.assert_close(model.train()(images), bias.expand(2, CLASSES))


def test_dropout_probability_is_applied():
    """The layer sums its inputs: of 100,000 ones, a fifth is dropped and the rest is scaled by 1 / 0.8."""
    model = nn.Sequential(nn.Linear(100_000, 1, bias=False)).requires_grad_(False)
    model[0].weight.fill_(1)
    set_dropout(model, ("0",), 0.2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model.train()(torch.ones(2, 100_000))
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs, torch.full((2, 1), 100_000.0), rtol=0.01, atol=0)
    assert not torch.equal(outputs, torch.full((2, 1), 100_000.0))


def test_existing_dropout_is_changed_instead_of_added():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
    layer = model[1]
    set_dropout(model, ("1",), 0.1)
    assert model[0].p == 0.1
    assert model[1] is layer


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:test_resnet"])
def test_dropout_out_of_range_is_rejected(name, dropout):
    with pytest.raises(InputError, match=rf"--dropout {dropout}: must be a probability from 0 to 1"):
        _build(name, dropout)


def test_dropout_requires_a_linear_classifier():
    model = nn.Sequential(nn.Flatten(), nn.Bilinear(2, 2, 3))
    with pytest.raises(InputError, match=r"classifier 1 of Sequential is a Bilinear, not a linear layer"):
        set_dropout(model, ("1",), 0.5)


def _pretrained(name: str):
    """Return a library, a spec, and a state for 1000 classes with random values."""
    spec = find_model(name, {})
    library = get_library(spec)
    state = library.build(spec, 1000).state_dict()
    generator = torch.Generator().manual_seed(4)
    return (
        library,
        spec,
        {
            key: torch.rand(value.shape, generator=generator) + 0.5 if value.is_floating_point() else value
            for key, value in state.items()
        },
    )


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:squeezenet1_1"])
@pytest.mark.parametrize("dropout", [None, 0.2])
def test_new_head_keeps_pretrained_body(name, dropout):
    library, spec, state = _pretrained(name)
    model = with_new_head(library, spec, state, 10_000, dropout)
    (path,) = library.classifiers(model)
    fresh = library.build(spec, 10_000).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if key.startswith(f"{path}.") else state[key]), key
    assert model.get_submodule(path).weight.shape[0] == 10_000


def test_network_with_10_000_classes_can_be_split():
    library, spec, _ = _pretrained("timm:test_resnet")
    state = library.build(spec, None).state_dict()
    model = with_new_head(library, spec, state, 10_000, 0.2)
    backbone = Backbone(model, library.classifiers(model), (64, 64))
    logits, embedding = backbone(_images(2, 64))
    assert logits.shape == (2, 10_000) == (2, backbone.classes)
    torch.testing.assert_close(backbone.head(embedding), logits)


def test_state_may_lack_head_but_not_body():
    library, spec, state = _pretrained("timm:test_resnet")
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    with_new_head(library, spec, body, 3)
    missing = {key: value for key, value in state.items() if key != "layer4.0.conv1.weight"}
    with pytest.raises(
        InputError, match=r"pretrained state of timm:test_resnet.*1 missing: layer4\.0\.conv1"
    ):
        with_new_head(library, spec, missing, 3)
    with pytest.raises(InputError, match=r"1 unexpected: fcx\.weight"):
        with_new_head(library, spec, {**state, "fcx.weight": torch.zeros(1)}, 3)
    with pytest.raises(InputError, match=r"1 of another shape: bn1\.weight"):
        with_new_head(library, spec, {**state, "bn1.weight": torch.zeros(1)}, 3)
