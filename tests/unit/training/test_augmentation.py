"""Tests for the sizes of training crops, and for input sizes that a network does not support."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from batchcls.errors import InputError
from batchcls.models.build import build_model
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import parse_model_arguments, resolve_model
from batchcls.models.sources import get_library
from batchcls.storage.filesystem import Storage
from batchcls.training.augmentation import adapt_crop_size, crop_size, image_transform
from batchcls.training.pixel_cache import PixelStore, uncropped
from batchcls.training.recipe import Recipe, read_recipe
from batchcls.training.sampling import LabeledRows
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.trainer import Hooks, Training

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
def test_network_is_trained_on_supported_crop_sizes(
    name: str, arguments: str, expected: tuple[int, int], log: pytest.LogCaptureFixture
):
    made = start(name, arguments)
    found = adapt_crop_size(read_recipe("fine-tune"), build_model(made), made.config)
    assert crops(found, made)[0] == expected
    lines = [line for line in log.messages if "does not support images of" in line]
    assert len(lines) == (1 if found != read_recipe("fine-tune") else 0)


def test_crop_size_below_the_minimum_of_the_network_is_not_used():
    made = start("torchvision:alexnet", input_size=64)
    found = adapt_crop_size(read_recipe("fine-tune"), build_model(made), made.config)
    assert crops(read_recipe("fine-tune"), made) == [(32, 32), (64, 64)]
    assert crops(found, made) == [(64, 64), (64, 64)]


@pytest.mark.parametrize(
    ("name", "more"),
    [("timm:vit_tiny_patch16_224", "dynamic_img_size=true"), ("timm:mixer_s32_224", "img_size=128")],
)
def test_unsupported_input_size_is_rejected_with_supported_alternatives(name: str, more: str):
    with pytest.raises(InputError, match=f"{name} does not accept images of 128 x 128 pixels") as refused:
        start(name, input_size=128)
    assert "omit --input-size to use the default of 224 x 224" in str(refused.value)
    assert start(name).config.preprocessing.input_height == 224
    remedy = re.search(r"add --model-args (\S+)$", str(refused.value))
    assert remedy is not None
    assert remedy[1] == more
    assert start(name, more, input_size=128).config.preprocessing.input_height == 128


# Names whose size is fixed, or that cut an image into windows or patches.
OF_PATCHES = (
    *(
        "vit_b_16",
        "swin_t",
        "torchvision:maxvit_t",
        "timm:vit_tiny_patch16_224",
        "timm:deit_tiny_patch16_224",
    ),
    *(
        "timm:deit_tiny_distilled_patch16_224",
        "timm:swin_tiny_patch4_window7_224",
        "timm:swinv2_cr_tiny_ns_224",
    ),
    *("timm:mixer_s32_224", "timm:resmlp_12_224", "timm:gmlp_ti16_224", "timm:maxvit_rmlp_pico_rw_256"),
    *("timm:coatnet_pico_rw_224", "timm:cait_xxs24_224", "timm:levit_128s", "timm:xcit_nano_12_p16_224"),
    *("timm:crossvit_tiny_240", "timm:nest_tiny_jx", "timm:pit_ti_224", "timm:convit_tiny"),
    *("timm:mobilevitv2_050", "timm:poolformer_s12", "timm:twins_svt_small"),
)


@pytest.mark.long
@pytest.mark.parametrize("name", OF_PATCHES)
def test_default_recipe_trains_patch_based_networks(name: str, tmp_path: Path):
    made = start(name)
    model = build_model(made)
    preprocessing = made.config.preprocessing
    chosen = read_recipe("fine-tune").with_changes(epochs=1, batch_size=2)
    whole = uncropped(preprocessing)
    random, rows, stores = np.random.default_rng(0), 4, []
    for part, taken in (("training", whole), ("validation", preprocessing)):
        np.save(tmp_path / f"{part}.npy", random.integers(0, 256, (rows, *taken.shape), np.uint8))
        stores.append(PixelStore([str(tmp_path / part)], Storage(), "unused"))
    labeled = LabeledRows(np.arange(rows), np.arange(rows, dtype=np.int32))
    settings = TrainingSettings(
        recipe=adapt_crop_size(chosen, model, made.config),
        preprocessing=preprocessing,
        classes=len(made.config.labels),
        trainable=("*",),
        training=labeled,
        validation=labeled,
        balance="none",
        seed=0,
        micro_batch_size=None,
        precision="fp32",
        loader_processes=0,
    )
    steps: list[int] = []
    hooks = Hooks(lambda one: one, lambda _, seen: steps.append(seen), lambda *_: None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    training = Training(
        model, get_library(made.config.spec).classifiers(model), settings, DistributedContext(), hooks
    )
    assert training.run(*stores) is None
    assert steps == [2, 4]
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert training.history[0]["validation_rows"] == rows


@pytest.mark.parametrize("size", [(64, 64), (64, 48), (32, 64)])
def test_crops_with_ratio_one_are_not_distorted(size: tuple[int, int]):
    """The values of the image are its coordinates, so that their slopes are the magnifications."""
    rows, columns = np.mgrid[:250, :250].astype(np.uint8)
    image = torch.from_numpy(np.stack([rows, columns, rows]))
    recipe = read_recipe("fine-tune").with_changes(
        crop_ratio=(1.0, 1.0), crop_scale=(0.3, 0.5), flip=0.0, color_jitter=0.0
    )
    transform = image_transform(recipe, size, start("timm:test_resnet").config.preprocessing)
    torch.manual_seed(0)
    for _ in range(5):
        crop = transform(image).numpy().astype(float)
        down = np.diff(crop[0, 4:-4], axis=0).mean()
        right = np.diff(crop[1, :, 4:-4], axis=1).mean()
        assert right == pytest.approx(down, rel=0.05)


def test_training_crops_of_a_rectangle_keep_its_aspect_ratio():
    made = start("timm:test_resnet", input_size="256x192", crop_mode="border")
    recipe = read_recipe("fine-tune").with_changes(
        size_fraction=0.75, final_size_fraction=1.0, final_epochs=1
    )
    assert crops(recipe, made) == [(192, 144), (256, 192)]
