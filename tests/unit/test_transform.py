"""Geometry and pixels of the transform against timm and torchvision themselves."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as reference
from torchvision.transforms._presets import ImageClassification

from batchcls.images.transform import Transform, normalize
from batchcls.preprocessing import Preprocessing
from tests.drawing import draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(500, 375), (375, 500), (61, 47), (224, 224), (333, 501), (97, 801), (1001, 64), (256, 257)]
# Largest difference to Pillow, in levels of 255: torch's kernels round their weights otherwise.
BOUND = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 2}


def preprocessing(size, resize, **options):
    """A record for square or (height, width) sizes."""
    height, width = (size, size) if isinstance(size, int) else size
    resize_height, resize_width = (resize, resize) if isinstance(resize, int) else resize
    return Preprocessing(
        input_height=height, input_width=width, resize_height=resize_height, resize_width=resize_width,
        mean=MEAN, std=STD, **options,
    )  # fmt: skip


def pixels_of(image: Image.Image) -> torch.Tensor:
    """uint8 3 x H x W with H x W x 3 memory, as decode gives it."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(ours: np.ndarray, theirs: torch.Tensor) -> int:
    assert ours.shape == tuple(theirs.permute(1, 2, 0).shape)
    return int(np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int)).max())


@pytest.mark.parametrize("width_height", SIZES)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("size", "crop_pct"), [(96, 0.875), (96, 1.0), (95, 0.9), ((64, 96), 0.875)])
def test_pixels_equal_those_of_timm(width_height, crop_mode, size, crop_pct):
    image = draw(3, *width_height)
    resize = int(size // crop_pct) if isinstance(size, int) else tuple(int(side // crop_pct) for side in size)
    shape = (3, size, size) if isinstance(size, int) else (3, *size)
    timm_transform = create_transform(
        shape,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        normalize=False,
    )
    ours = Transform(preprocessing(size, resize, crop_mode=crop_mode, interpolation="bicubic"))(
        pixels_of(image)
    )
    assert difference(ours, timm_transform(image)) <= BOUND["bicubic"]


@pytest.mark.parametrize("width_height", SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pixels_equal_those_of_torchvision_on_pillow(width_height, interpolation):
    image = draw(4, *width_height)
    mode = reference.InterpolationMode(interpolation)
    theirs = reference.pil_to_tensor(reference.center_crop(reference.resize(image, [109], mode), [96]))
    ours = Transform(preprocessing(96, 109, interpolation=interpolation))(pixels_of(image))
    assert difference(ours, theirs) <= BOUND[interpolation]


@pytest.mark.parametrize("width_height", SIZES)
def test_transform_and_normalize_equal_the_preset_of_torchvision_weights(width_height):
    image = draw(5, *width_height)
    record = preprocessing(96, 109, interpolation="bilinear")
    preset = ImageClassification(crop_size=96, resize_size=109, mean=MEAN, std=STD)
    ours = normalize(Transform(record)(pixels_of(image))[np.newaxis], record)
    assert ours.dtype == np.float32
    one_level = 1 / 255 / min(STD)
    assert np.abs(ours[0].transpose(2, 0, 1) - preset(image).numpy()).max() <= one_level * 1.001


def test_normalize_equals_torchvision_bit_for_bit():
    batch = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    theirs = torch.stack([reference.normalize(reference.to_tensor(image), MEAN, STD) for image in batch])
    assert np.array_equal(normalize(batch, preprocessing(16, 16)), theirs.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_result_is_contiguous_uint8_and_leaves_its_input_alone(crop_mode, interpolation):
    pixels = pixels_of(draw(6, 96, 96))
    before = pixels.clone()
    result = Transform(preprocessing(96, 96, crop_mode=crop_mode, interpolation=interpolation))(pixels)
    assert result.flags.c_contiguous
    assert (result.dtype, result.shape) == (np.uint8, (96, 96, 3))
    result[:] = 0
    assert torch.equal(pixels, before)


def test_memory_layout_of_the_input_does_not_change_the_result():
    pixels = pixels_of(draw(8, 300, 200))
    transform = Transform(preprocessing(96, 109, interpolation="bilinear"))
    assert np.array_equal(transform(pixels), transform(pixels.contiguous()))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(3, 8, 200_000), (3, 200_000, 8)])
def test_extremely_long_pictures_give_their_middle_without_growing(crop_mode, shape):
    pixels = torch.zeros(shape, dtype=torch.uint8)
    middle = shape.index(200_000)
    pixels.narrow(middle, 100_000 - 16, 32).fill_(255)
    result = Transform(preprocessing(96, 109, crop_mode=crop_mode))(pixels)
    assert result.shape == (96, 96, 3)
    if crop_mode == "center":
        assert result.min() == 255
