"""Loads the pixels of the sample for one preprocessing, with the loader of `classify`."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.errors import InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.images.loader import Loader
from batchcls.manifest.sample import LABEL, RowSample
from batchcls.preprocessing import Preprocessing
from batchcls.schema import DECODE_SECONDS, FETCH_SECONDS, PIXELS
from batchcls.storage.filesystem import is_remote

# Concurrent requests to remote storage. Local files are read sequentially, which gives the time of a single image.
_REMOTE_REQUESTS = 16
_BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class SamplePixels:
    """Pixels of the images of the sample that could be decoded, in the order of the sample.

    Attributes:
        pixels: N x H x W x 3, uint8.
        sizes: N x 2, height and width of the original images.
        labels: N labels of the manifest, or None.
        median_ms: Median time to fetch, decode and resize an image on one core.
        failures: Number of images that could not be loaded, by reason.
    """

    pixels: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    labels: tuple[str | None, ...]
    median_ms: float
    failures: Counter[str]


def pixels_key(preprocessing: Preprocessing) -> Preprocessing:
    """Key of the pixels, equal for preprocessing settings that give equal pixels.

    Mean and std are applied later by the engine and only determine the border color of the crop mode `border`.
    """
    if preprocessing.crop_mode == "border":
        return preprocessing
    return preprocessing.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})


def load_sample_pixels(
    sample: RowSample,
    preprocessing: Preprocessing,
    fetch: FetchPolicy,
    limits: DecodeLimits,
    decode_margin: float | None = None,
) -> SamplePixels:
    """Fetch, decode and resize the images of the sample. Failed images are counted, never replaced.

    Args:
        sample: Rows to load.
        preprocessing: Preprocessing of the model.
        fetch: Policy for fetching images.
        limits: Limits for decoding.
        decode_margin: See `LoadSettings`.

    Raises:
        InputError: No image can be loaded; the message lists the reasons.
    """
    kept = tuple(field for field in sample.rows.schema if field.name == LABEL)
    settings = LoadSettings(
        base=sample.base,
        kept=kept,
        fetch=fetch,
        limits=limits,
        preprocessing=preprocessing,
        fetch_threads=_REMOTE_REQUESTS if is_remote(sample.base) else 1,
        block_rows=_BLOCK_ROWS,
        decode_margin=decode_margin,
    )
    tables = (sample.rows.slice(start, _BLOCK_ROWS) for start in range(0, sample.rows.num_rows, _BLOCK_ROWS))
    loaded = pa.concat_tables(Loader(settings).load(tables, {}))
    failures = Counter(loaded.column("reason").drop_null().to_pylist())
    good = loaded.filter(loaded.column(PIXELS).is_valid())
    if good.num_rows == 0:
        raise InputError(
            f"none of the {loaded.num_rows} sampled images can be read "
            f"({', '.join(f'{reason}={count}' for reason, count in failures.most_common())}); run "
            "`batchcls classify` on this manifest for the details in quarantine/"
        )
    seconds = np.add(*(good.column(name).to_numpy() for name in (FETCH_SECONDS, DECODE_SECONDS)))
    return SamplePixels(
        pixels=stack_pixels(good, preprocessing),
        sizes=np.column_stack([good.column(name).to_numpy() for name in ("height", "width")]),
        labels=tuple(good.column(LABEL).to_pylist()) if kept else (None,) * good.num_rows,
        median_ms=float(np.median(seconds)) * 1e3,
        failures=failures,
    )


def stack_pixels(good: pa.Table, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Stack the pixels of N loaded rows into N x H x W x 3. All rows must have pixels; N is at least 1."""
    images = (np.frombuffer(value.as_buffer(), np.uint8) for value in good.column(PIXELS))
    return np.stack([image.reshape(preprocessing.shape) for image in images])
