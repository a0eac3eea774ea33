"""RGB pixels of any size to a network's input, as its `Preprocessing` says.

The geometry is that of `timm.data.create_transform` and of torchvision's `weights.transforms()`,
rounding included, so that weights see the pixels they were measured with. The smooth
filters run on uint8 in torch's vectorized kernel, which reads H x W x 3 memory best; they differ
from Pillow's by one level at most (bilinear) or two (bicubic, lanczos).
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from batchcls.preprocessing import Preprocessing, Views

# What `torch.nn.functional.interpolate(antialias=True)` calls. It cannot be told to stop early.
_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
    "lanczos": torch.ops.aten._upsample_lanczos2d_aa,
}
# How far each filter reaches to both sides, in pixels of the coarser of source and result.
_REACH = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
# An image 8 pixels high and ten million wide would grow to hundreds of gigabytes when its short
# side meets the resize. Beyond this ratio only its middle is resized; the crop shows no more.
_MAX_ASPECT_RATIO = 32


class Transform:
    """Resize and crop of one set of weights; stateless after construction, safe to share between threads.

    `views` says whether the center alone is cropped or the four corners before it, too.
    """

    def __init__(self, preprocessing: Preprocessing, views: Views | None = None) -> None:
        self._preprocessing = preprocessing
        self._crops = 1 if views is None else views.crops
        self._fill = np.array([round(255 * mean) for mean in preprocessing.mean], dtype=np.uint8)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this size, upright, is resized to before it is cropped.

        An image that is resized in no smooth way, or of which only the middle is, is given back its
        own size: it is needed whole (`decode`).
        """
        if self._preprocessing.interpolation not in _KERNELS or _is_extremely_long(height, width):
            return height, width
        return _resized(height, width, self._preprocessing)

    def min_decoded_size(self, margin: float) -> Callable[[int, int], tuple[float, float]]:
        """For `decode`: `margin` times as high and wide as an image is resized to, at least."""

        def least(height: int, width: int) -> tuple[float, float]:
            resized = self.resized_size(height, width)
            return margin * resized[0], margin * resized[1]

        return least

    def __call__(self, pixels: np.ndarray, extent: tuple[float, float] | None = None) -> np.ndarray:
        """Resize and crop uint8 H x W x 3 to C-contiguous uint8 input_height x input_width x 3.

        With five crops the result has them in front: 5 x input_height x input_width x 3.
        `extent` is that of `decode.Decoded` where `pixels` may be a reduced image: then what is
        seen of it is what would be seen of the whole.
        """
        if extent is None or extent == pixels.shape[:2]:
            if self._preprocessing.crop_mode == "center":
                pixels = _without_far_ends(pixels)
            extent = pixels.shape[0], pixels.shape[1]
        size = _resized(*extent, self._preprocessing)
        resized = self._resize(pixels, extent, size)
        center = self._crop_or_pad(resized, size)
        return center if self._crops == 1 else np.stack([*self._corners(resized), center])

    def _resize(self, pixels: np.ndarray, extent: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """The upper left part, H x W x 3, of the image resized to `size`: as much of it as is cropped to.

        What lies below and to the right of it is neither read nor made, which saves 7 to 22 % of the
        time (docs/measurements); the values are those of the whole. Possibly `pixels` themselves.
        """
        factors = [after / before for after, before in zip(size, extent, strict=True)]
        if factors == [1, 1]:
            return pixels
        mode = self._preprocessing.interpolation
        if mode not in _KERNELS:
            # torch's "nearest" takes other pixels than Pillow's, which is what weights were trained with.
            return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST))
        seen = self._seen(size)
        pixels = pixels[: _source_rows(seen[0], factors[0], _REACH[mode])]
        # The kernel takes an axis that comes out as long as it went in for one that is not resized.
        made = [
            last + (last == held and factor != 1)
            for last, held, factor in zip(seen, pixels.shape, factors, strict=False)
        ]
        batch = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        resized = _KERNELS[mode](batch, made, False, *factors)
        hwc: np.ndarray = resized.squeeze(0).permute(1, 2, 0).numpy()
        return hwc[: size[0], : size[1]]

    def _seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """How many rows and columns of an image resized to `size` reach to the end of what is cropped."""
        if self._crops > 1:
            return size
        height, width, _ = self._preprocessing.shape
        return _window(size[0], height)[0].stop, _window(size[1], width)[0].stop

    def _corners(self, hwc: np.ndarray) -> Iterator[np.ndarray]:
        height, width, _ = self._preprocessing.shape
        for rows in (slice(height), slice(hwc.shape[0] - height, None)):
            for columns in (slice(width), slice(hwc.shape[1] - width, None)):
                yield hwc[rows, columns]

    def _crop_or_pad(self, hwc: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The center of an image resized to `size`, of which `hwc` holds at least what is seen."""
        rows, to_rows = _window(size[0], self._preprocessing.input_height)
        columns, to_columns = _window(size[1], self._preprocessing.input_width)
        result = np.empty(self._preprocessing.shape, dtype=np.uint8)
        if self._preprocessing.crop_mode == "border":
            result[:] = self._fill
        result[to_rows, to_columns] = hwc[rows, columns]
        return result


def _source_rows(made: int, factor: float, reach: int) -> int:
    """How many rows of an image the first `made` rows of its resize read."""
    return math.ceil(made / factor + reach * max(1.0, 1 / factor)) + 1


def normalize(batch: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """uint8 N x H x W x 3 to float32 of the same shape: divided by 255, minus mean, divided by std.

    Bit for bit what `ToTensor` and `Normalize` of torchvision give.
    """
    scaled = batch.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= np.array(preprocessing.mean, dtype=np.float32)
    scaled /= np.array(preprocessing.std, dtype=np.float32)
    return scaled


def _is_extremely_long(height: int, width: int) -> bool:
    return max(height, width) > _MAX_ASPECT_RATIO * min(height, width)


def _without_far_ends(pixels: np.ndarray) -> np.ndarray:
    """Cut the same number of rows or columns from both ends until the aspect ratio is bearable."""
    height, width = pixels.shape[:2]
    rows = max(0, height - _MAX_ASPECT_RATIO * width) // 2
    columns = max(0, width - _MAX_ASPECT_RATIO * height) // 2
    return pixels[rows : height - rows, columns : width - columns]


def _resized(height: float, width: float, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width after the resize; at least one pixel each."""
    target_height, target_width = preprocessing.resize_height, preprocessing.resize_width
    if preprocessing.crop_mode == "squash":
        return target_height, target_width
    if preprocessing.crop_mode == "center" and target_height == target_width:
        # Resize(size) of torchvision: the long side is rounded down.
        if width <= height:
            return int(target_height * height / width), target_width
        return target_height, int(target_width * width / height)
    # ResizeKeepRatio of timm: both sides are rounded to the nearest.
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if preprocessing.crop_mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _window(size: int, crop: int) -> tuple[slice, slice]:
    """Where to read along one axis, and where to write in the crop; odd remainders go as in torchvision."""
    if size < crop:
        start = (crop - size) // 2
        return slice(0, size), slice(start, start + size)
    start = round((size - crop) / 2)
    return slice(start, start + crop), slice(0, crop)
