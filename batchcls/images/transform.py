"""Transform RGB pixels of any size to the input of a network, as its `Preprocessing` defines.

The geometry equals that of `timm.data.create_transform` and of torchvision's `weights.transforms()`, including
rounding, so that weights receive the pixels they were evaluated with. Smooth filters run on uint8 in torch's
vectorized kernel, which is fastest with H x W x 3 memory. They differ from Pillow's by at most one level (bilinear) or
two (bicubic, lanczos).
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from batchcls.preprocessing import Preprocessing, Views

# The kernels of `torch.nn.functional.interpolate(antialias=True)`, which itself cannot compute a part of the result.
_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
    "lanczos": torch.ops.aten._upsample_lanczos2d_aa,
}
# Radius of each filter, in pixels of the coarser of source and result.
_FILTER_RADIUS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
# Resizing the short side of an image of 8 x 10,000,000 pixels would require hundreds of gigabytes. Beyond this ratio
# only the middle of the image is resized; the crop contains no more of it.
_MAX_ASPECT_RATIO = 32


class Transform:
    """Resizes and crops images for one set of weights; stateless after construction and thread-safe.

    `views` defines whether only the center is cropped, or also the four corners.
    """

    def __init__(self, preprocessing: Preprocessing, views: Views | None = None) -> None:
        self._preprocessing = preprocessing
        self._crops = 1 if views is None else views.crops
        self._fill = np.array([round(255 * mean) for mean in preprocessing.mean], dtype=np.uint8)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an upright image of this size is resized before the crop.

        Returns the given size if the image must be decoded at full scale: if the interpolation is not smooth, or if
        only the middle of the image is resized.
        """
        if self._preprocessing.interpolation not in _KERNELS or _is_extremely_long(height, width):
            return height, width
        return _resized(height, width, self._preprocessing)

    def min_decoded_size(self, margin: float) -> Callable[[int, int], tuple[float, float]]:
        """Minimum size for `decode`: `margin` times the size to which the image is resized."""

        def min_size(height: int, width: int) -> tuple[float, float]:
            resized = self.resized_size(height, width)
            return margin * resized[0], margin * resized[1]

        return min_size

    def __call__(self, pixels: np.ndarray, extent: tuple[float, float] | None = None) -> np.ndarray:
        """Resize and crop uint8 H x W x 3 to C-contiguous uint8 input_height x input_width x 3.

        With five crops, the result is 5 x input_height x input_width x 3. `extent` is that of `decode.Decoded` if
        `pixels` may be a reduced image; the crop then shows the same part as that of the full-scale image.
        """
        if extent is None or extent == pixels.shape[:2]:
            if self._preprocessing.crop_mode == "center":
                pixels = _cut_ends(pixels)
            extent = pixels.shape[0], pixels.shape[1]
        size = _resized(*extent, self._preprocessing)
        resized = self._resize(pixels, extent, size)
        center = self._crop_or_pad(resized, size)
        return center if self._crops == 1 else np.stack([*self._corners(resized), center])

    def _resize(self, pixels: np.ndarray, extent: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
        """Compute the upper left part, H x W x 3, of the image resized to `size`, as far as the crop needs it.

        The rest is neither read nor computed, which saves 7 to 22 % of the time (docs/measurements); the values
        equal those of a full resize. May return `pixels` itself.
        """
        factors = [after / before for after, before in zip(size, extent, strict=True)]
        if factors == [1, 1]:
            return pixels
        mode = self._preprocessing.interpolation
        if mode not in _KERNELS:
            # torch's "nearest" selects other pixels than Pillow's, with which the weights were trained.
            return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.NEAREST))
        needed = self._needed_size(size)
        pixels = pixels[: _source_rows(needed[0], factors[0], _FILTER_RADIUS[mode])]
        # The kernel does not resize an axis whose input and output lengths are equal.
        computed = [
            length + (length == source_length and factor != 1)
            for length, source_length, factor in zip(needed, pixels.shape, factors, strict=False)
        ]
        batch = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        resized = _KERNELS[mode](batch, computed, False, *factors)
        hwc: np.ndarray = resized.squeeze(0).permute(1, 2, 0).numpy()
        return hwc[: size[0], : size[1]]

    def _needed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Number of rows and columns of an image resized to `size` up to the end of the crop."""
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
        """Crop the center of an image resized to `size`; `hwc` contains at least the needed part of it."""
        rows, to_rows = _window(size[0], self._preprocessing.input_height)
        columns, to_columns = _window(size[1], self._preprocessing.input_width)
        result = np.empty(self._preprocessing.shape, dtype=np.uint8)
        if self._preprocessing.crop_mode == "border":
            result[:] = self._fill
        result[to_rows, to_columns] = hwc[rows, columns]
        return result


def _source_rows(rows: int, factor: float, radius: int) -> int:
    """Number of source rows that the first `rows` rows of the resized image depend on."""
    return math.ceil(rows / factor + radius * max(1.0, 1 / factor)) + 1


def normalize(batch: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Convert uint8 N x H x W x 3 to float32 of the same shape: divide by 255, subtract mean, divide by std.

    The result is bit-identical to that of torchvision's `ToTensor` and `Normalize`.
    """
    scaled = batch.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= np.array(preprocessing.mean, dtype=np.float32)
    scaled /= np.array(preprocessing.std, dtype=np.float32)
    return scaled


def _is_extremely_long(height: int, width: int) -> bool:
    return max(height, width) > _MAX_ASPECT_RATIO * min(height, width)


def _cut_ends(pixels: np.ndarray) -> np.ndarray:
    """Cut equally many rows or columns from both ends until the aspect ratio is within the limit."""
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
        # torchvision's Resize(size) rounds the long side down.
        if width <= height:
            return int(target_height * height / width), target_width
        return target_height, int(target_width * width / height)
        # timm's ResizeKeepRatio rounds both sides to the nearest integer.
    ratios = height / target_height, width / target_width
    ratio = max(ratios) if preprocessing.crop_mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def _window(size: int, crop: int) -> tuple[slice, slice]:
    """Source and target slices of a crop along one axis; odd remainders are distributed as in torchvision."""
    if size < crop:
        start = (crop - size) // 2
        return slice(0, size), slice(start, start + size)
    start = round((size - crop) / 2)
    return slice(start, start + crop), slice(0, crop)
