"""Training crops of a size that the network takes; and an input size that it does not take, refused with a remedy."""

import re

import pytest

from batchcls.errors import InputError
from batchcls.models.build import build_model
from batchcls.models.bundle import Bundle
from batchcls.models.choices import ModelChoices
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.models.spec import PreprocessingOverrides
from batchcls.storage import Storage
from batchcls.training.augment import crop_size
from batchcls.training.crops import fitting_recipe
from batchcls.training.recipe import Recipe, read_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def start(name: str, arguments: str = "", **overrides: object) -> Bundle:
    choices = ModelChoices(
        allow_random=True,
        arguments=parse_model_arguments(arguments),
        overrides=PreprocessingOverrides(**overrides),
    )
    return resolve_model(name, choices, Storage())


def crops(recipe: Recipe, made: Bundle) -> list[tuple[int, int]]:
    return [crop_size(recipe, epoch, made.config.preprocessing) for epoch in (0, recipe.epochs - 1)]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("timm:test_vit", "", (128, 128)),
        ("timm:vit_tiny_patch16_224", "", (224, 224)),
        ("timm:vit_tiny_patch16_224", "dynamic_img_size=true", (160, 160)),
        ("timm:vit_tiny_patch16_224", "img_size=96", (96, 96)),
        ("timm:test_resnet", "", (128, 128)),
        ("timm:deit_tiny_patch16_224", "", (224, 224)),
        ("timm:mixer_s32_224", "", (224, 224)),
        ("timm:swin_tiny_patch4_window7_224", "", (224, 224)),
        ("timm:gmlp_ti16_224", "", (224, 224)),
    ],
)
def test_a_network_is_trained_on_crops_that_it_takes(
    name: str, arguments: str, expected: tuple[int, int], log: pytest.LogCaptureFixture
):
    made = start(name, arguments)
    found = fitting_recipe(read_recipe("fine-tune"), build_model(made), made.config)
    assert crops(found, made)[0] == expected
    lines = [line for line in log.messages if "takes no images of" in line]
    assert len(lines) == (1 if found != read_recipe("fine-tune") else 0)


def test_a_size_below_what_a_network_takes_is_no_crop_either():
    made = start("torchvision:alexnet", input_size=64)
    found = fitting_recipe(read_recipe("fine-tune"), build_model(made), made.config)
    assert crops(read_recipe("fine-tune"), made) == [(32, 32), (64, 64)]
    assert crops(found, made) == [(64, 64), (64, 64)]


@pytest.mark.parametrize(
    ("name", "more"),
    [("timm:vit_tiny_patch16_224", "dynamic_img_size=true"), ("timm:mixer_s32_224", "img_size=128")],
)
def test_an_input_size_that_a_network_does_not_take_is_refused_with_what_works(name: str, more: str):
    with pytest.raises(InputError, match=f"{name} does not take images of 128 x 128 pixels") as refused:
        start(name, input_size=128)
    assert "leave --input-size out, for its own size is 224 x 224" in str(refused.value)
    assert start(name).config.preprocessing.input_height == 224
    remedy = re.search(r"add --model-args (\S+)$", str(refused.value))
    assert remedy is not None
    assert remedy[1] == more
    assert start(name, more, input_size=128).config.preprocessing.input_height == 128
