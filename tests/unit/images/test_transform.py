"""Geometry and pixels of the transform equal those of timm and torchvision."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torch.nn.functional import interpolate
from torchvision.transforms import functional as reference
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional as on_tensors

from batchcls.images.transform import Transform, normalize
from batchcls.preprocessing import Preprocessing
from tests.helpers.drawing import draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(500, 375), (375, 500), (61, 47), (224, 224), (333, 501), (97, 801), (1001, 64), (256, 257)]
# Maximum difference to Pillow, in levels of 255, because torch's kernels round filter weights differently.
BOUND = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 2}


def preprocessing(size, resize, **options):
    """Preprocessing with square or (height, width) sizes."""
    height, width = (size, size) if isinstance(size, int) else size
    resize_height, resize_width = (resize, resize) if isinstance(resize, int) else resize
    return Preprocessing(
        input_height=height, input_width=width, resize_height=resize_height, resize_width=resize_width,
        mean=MEAN, std=STD, **options,
    )  # fmt: skip


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 H x W x 3, as returned by decode."""
    return np.array(image)


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
def test_result_is_contiguous_uint8_and_input_is_unchanged(crop_mode, interpolation):
    pixels = pixels_of(draw(6, 96, 96))
    before = pixels.copy()
    result = Transform(preprocessing(96, 96, crop_mode=crop_mode, interpolation=interpolation))(pixels)
    assert result.flags.c_contiguous
    assert (result.dtype, result.shape) == (np.uint8, (96, 96, 3))
    result[:] = 0
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("width_height", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_resize_equals_torchvision_on_uint8_tensors_bit_for_bit(width_height, interpolation):
    pixels = pixels_of(draw(8, *width_height))
    mode = on_tensors.InterpolationMode(interpolation)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    theirs = on_tensors.center_crop(on_tensors.resize(chw, [109], mode, antialias=True), [96])
    ours = Transform(preprocessing(96, 109, interpolation=interpolation))(pixels)
    assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())


@given(
    height=st.integers(20, 300),
    width=st.integers(20, 300),
    crop_and_resize=st.sampled_from([(96, 109), (96, 96), (100, 128), (64, 255)]),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
    crop_mode=st.sampled_from(["center", "squash"]),
)
# Sides for which the needed part is as long as the source, which the kernel would not resize.
@example(254, 300, (254, 255), "bilinear", "center")
@example(300, 254, (254, 255), "bicubic", "center")
@example(118, 120, (96, 140), "lanczos", "center")
def test_partial_resize_equals_a_crop_of_the_full_resize(
    height, width, crop_and_resize, interpolation, crop_mode
):
    crop, resize = crop_and_resize
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
    ours = Transform(preprocessing(crop, resize, interpolation=interpolation, crop_mode=crop_mode))
    whole = interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0),
        ours.resized_size(height, width),
        mode=interpolation,
        antialias=True,
    )
    theirs = on_tensors.center_crop(whole, [crop])[0].permute(1, 2, 0).numpy()
    assert np.array_equal(ours(pixels), theirs)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 64)])
@pytest.mark.parametrize("width_height", [(1001, 642), (640, 999), (800, 800), (1601, 643)])
def test_scaled_image_is_cropped_like_the_full_scale_image(crop_mode, size, width_height):
    """Colors are smooth, so that differences show the position and not the sharpness. The last pixel is half empty."""
    width, height = width_height
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([255 * rows / height, 255 * columns / width, 0 * rows], axis=2).astype(np.uint8)
    transform = Transform(preprocessing(size, size, crop_mode=crop_mode))
    padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    reduced = np.array(Image.fromarray(padded).reduce(8))
    whole, ours = transform(image), transform(reduced, (height / 8, width / 8))
    assert np.abs(whole.astype(int) - ours).max() <= 1
    assert transform(reduced).shape == whole.shape


def test_resized_size_is_computed_from_the_image_size():
    shorter = Transform(preprocessing(96, 109))
    assert shorter.resized_size(375, 500) == (109, 145)
    assert Transform(preprocessing((64, 96), (73, 109))).resized_size(375, 500) == (82, 109)
    assert Transform(preprocessing(96, 109, crop_mode="squash")).resized_size(375, 500) == (109, 109)
    assert Transform(preprocessing(96, 109, crop_mode="border")).resized_size(375, 500) == (82, 109)


@pytest.mark.parametrize(
    ("height", "width", "options"), [(375, 500, {"interpolation": "nearest"}), (8, 4000, {}), (4000, 8, {})]
)
def test_images_that_need_full_scale(height, width, options):
    assert Transform(preprocessing(96, 109, **options)).resized_size(height, width) == (height, width)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(8, 200_000, 3), (200_000, 8, 3)])
def test_extremely_long_images_use_their_middle_without_growing(crop_mode, shape):
    pixels = np.zeros(shape, dtype=np.uint8)
    pixels.swapaxes(0, shape.index(200_000))[100_000 - 16 : 100_000 + 16] = 255
    result = Transform(preprocessing(96, 109, crop_mode=crop_mode))(pixels)
    assert result.shape == (96, 96, 3)
    if crop_mode == "center":
        assert result.min() == 255
