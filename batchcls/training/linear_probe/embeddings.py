"""Computes the embeddings of a manifest with the loader of the main job and stores them on disk.

The embeddings of a frozen network do not change, so every image is computed once, and its mirrored version once
more if requested. Other augmentations change the pixels in every epoch and are not supported.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from batchcls.comparison.sample_pixels import load_sample_pixels, stack_pixels
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.engine_record import EngineRequest
from batchcls.inference.engine_selection import CalibrationImages, select_engine
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.sample import take_sample
from batchcls.manifest.snapshot import Manifest
from batchcls.models.engines.batching import predict_batches
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import REFERENCE, Device, Engine, EngineChoice, EngineConfig, EngineOutput
from batchcls.models.engines.factory import describe_engine
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing
from batchcls.schema import PIXELS, ROW, Reason
from batchcls.storage.filesystem import Storage, is_remote
from batchcls.storage.uris import canonical_location
from batchcls.training.duplicates.fingerprints import Fingerprints, fingerprint_images
from batchcls.training.linear_probe.embedding_store import (
    EmbeddingStore,
    FloatName,
    StoreShape,
    Values,
    open_store,
)

_logger = logging.getLogger(__name__)

_REMOTE_REQUESTS = 64
_BLOCK_ROWS = 64
_FRAGMENT_ROWS = 2048
_FLUSH_SECONDS = 20.0
# With fewer forward passes, measuring engines and converting networks takes longer than it saves.
_MIN_PASSES_TO_MEASURE = 2000
_CALIBRATION_IMAGES = 128
_MEASURE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How embeddings are computed and where they are stored.

    Attributes:
        fetch: how images are fetched.
        limits: limits on decoded images.
        mirrored: also embed every image flipped horizontally.
        dtype: data type of the stored values; float16 has three significant digits and half the size.
        choice: engine and precision; None: measured on this machine if there are thousands of images.
        device: device of the network.
        threads: number of CPU threads for decoding and for the network.
        batch_size: images per forward pass, unless it is measured together with the engine.
        cache_dir: local cache folder; None: the default of `CompileCache.at`.
    """

    fetch: FetchPolicy
    limits: DecodeLimits
    mirrored: bool = True
    dtype: FloatName = "float16"
    choice: EngineChoice | None = None
    device: Device = "cpu"
    threads: int = 1
    batch_size: int = 16
    cache_dir: str | None = None

    @property
    def folder(self) -> Path:
        """Folder of all embeddings, next to the compiled networks."""
        return CompileCache.from_cache_dir(self.cache_dir).folder.parent / "embeddings"


@dataclass(frozen=True, slots=True)
class ManifestEmbeddings:
    """The embeddings of a manifest.

    Attributes:
        values: memory-mapped array of shape (V, N, D); V is 1, or 2 with the mirrored images last.
        good: boolean array of shape (N,), true for rows that have embeddings.
        failures: number of other rows by reason.
        fingerprints: memory-mapped fingerprints of the images, of shape (N,).
    """

    values: Values
    good: npt.NDArray[np.bool_]
    failures: dict[str, int]
    fingerprints: Fingerprints


def embed(
    bundle: Bundle,
    manifest: Manifest,
    settings: EmbeddingSettings,
    storage: Storage,
    on_open: Callable[[EmbeddingStore], object] | None = None,
) -> ManifestEmbeddings:
    """Compute the embeddings of all images of a manifest, and reuse stored ones.

    Images that fail are counted by reason. Images that could not be fetched are tried again by the next call.

    Args:
        bundle: network in evaluation mode; the embedding is taken at its `embedding_tap`.
        manifest: manifest of the images; row n of the result is row n of the snapshot.
        settings: how embeddings are computed and where they are stored.
        storage: storage that holds the manifest.
        on_open: called with the store before the computation starts, for progress; the store may be read from any
            thread.

    Raises:
        InputError: the bundle is invalid, the engine is not available, or the disk is not writable.
        GoldenMismatch: the outputs of the network differ from the golden outputs of the bundle.
    """
    shape = StoreShape(
        2 if settings.mirrored else 1, manifest.rows, bundle.config.embedding_dimension, settings.dtype
    )
    with open_store(settings.folder, _key(bundle, manifest, settings), shape) as store:
        if on_open is not None:
            on_open(store)
        if store.remaining.any():
            with _preserve_torch_threads():
                _fill(store, bundle, manifest, settings, storage)
        else:
            _logger.info("reused the embeddings of %d rows: %s", manifest.rows, store.folder)
        return ManifestEmbeddings(store.values, store.good, dict(store.failures), store.fingerprints)


@dataclass(frozen=True, slots=True)
class ImageEmbeddings:
    """The embeddings of some images.

    Attributes:
        rows: numbers of the images that have an embedding, int64 of shape (n,).
        values: their embeddings, float32 of shape (n, D).
        hashes: SHA-256 of their contents.
        sizes: their original height and width in pixels, int32 of shape (n, 2).
        failures: reason of each image without an embedding, by number.
    """

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    hashes: tuple[str, ...]
    sizes: npt.NDArray[np.int32]
    failures: dict[int, str]


def embed_images(
    bundle: Bundle,
    images: pa.Table,
    base: str,
    settings: EmbeddingSettings,
    on_progress: Callable[[int], object] | None = None,
) -> ImageEmbeddings:
    """Compute the embeddings of a few images in float32, without storing them.

    Args:
        bundle: network with golden outputs; the embedding is taken at its `embedding_tap`.
        images: the columns of `FragmentReader`: row (any distinct numbers), item_id, uri, image, uri_fault.
        base: folder that relative URIs refer to.
        settings: how images are loaded and embedded; `mirrored`, `dtype` and `choice` have no effect.
        on_progress: called with the number of processed images.

    Raises:
        InputError: the bundle is invalid.
        GoldenMismatch: the outputs of the network differ from the golden outputs of the bundle.
    """
    conversions = CompileCache.from_cache_dir(settings.cache_dir)
    config = EngineConfig(settings.device, settings.threads, settings.batch_size, conversions)
    rows: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    values = [np.empty((0, bundle.config.embedding_dimension), np.float32)]
    sizes = [np.empty((0, 2), np.int32)]
    hashes: list[str] = []
    failures: dict[int, str] = {}
    done = 0
    with _preserve_torch_threads():
        engine, _ = start_tested_engine(bundle, REFERENCE, config)
        loader = Loader(_load_settings(bundle, base, settings))
        tables = (images.slice(start, _BLOCK_ROWS) for start in range(0, images.num_rows, _BLOCK_ROWS))
        for block in loader.load(tables, {}):
            failed = block.filter(block.column(PIXELS).is_null())
            failures |= dict(zip(failed[ROW].to_pylist(), failed["reason"].to_pylist(), strict=True))
            good = block.filter(block.column(PIXELS).is_valid())
            if good.num_rows:
                pixels, numbers = stack_pixels(good, bundle.config.preprocessing), good[ROW].to_numpy()
                batches = (
                    pixels[start : start + settings.batch_size]
                    for start in range(0, len(pixels), settings.batch_size)
                )
                found = np.concatenate([output.embedding for output in predict_batches(engine, batches)])
                finite = np.isfinite(found).all(axis=1)
                failures |= dict.fromkeys(numbers[~finite].tolist(), Reason.NON_FINITE.value)
                hashes += good.filter(pa.array(finite))["content_hash"].to_pylist()
                sizes.append(np.stack([good["height"].to_numpy(), good["width"].to_numpy()], 1)[finite])
                rows.append(numbers[finite])
                values.append(found[finite])
            done += block.num_rows
            if on_progress is not None:
                on_progress(done)
    return ImageEmbeddings(
        np.concatenate(rows), np.concatenate(values), tuple(hashes), np.concatenate(sizes), failures
    )


def _key(bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings) -> dict[str, object]:
    """Return everything that the embeddings depend on. Images are identified by the fingerprint of the manifest.

    The fingerprint of the bundle is not used, because labels and golden outputs do not affect embeddings.
    """
    config = bundle.config
    return {
        "name": config.architecture,
        "weights": config.weights.sha256,
        "network": [config.source, config.architecture, config.arguments, config.embedding_tap],
        "preprocessing": config.preprocessing.model_dump(mode="json"),
        "manifest": manifest.fingerprint,
        "base": canonical_location(manifest.base),
        "limits": [settings.limits.max_pixels, settings.limits.min_side_pixels, settings.fetch.max_bytes],
        "engine": "measured" if settings.choice is None else str(settings.choice),
    }


@contextmanager
def _preserve_torch_threads() -> Iterator[None]:
    """Restore the thread counts of the process, which engines and loaders change."""
    rows_before, arrow_threads = torch.get_num_threads(), pa.cpu_count()
    try:
        yield
    finally:
        torch.set_num_threads(rows_before)
        pa.set_cpu_count(arrow_threads)


def _fill(
    store: EmbeddingStore, bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings, storage: Storage
) -> None:
    """Embed the remaining rows."""
    remaining, rows_before, views = store.remaining, store.rows, store.values.shape[0]
    engine, batch_size = _start_engine(bundle, manifest, settings, storage, int(remaining.sum()) * views)
    loader = Loader(_load_settings(bundle, manifest.base, settings))
    blocks = loader.load(read_rows(manifest, FragmentReader(manifest.columns, storage), remaining), {})
    batches = _batches(blocks, bundle.config.preprocessing, batch_size, store)
    started = flushed = time.monotonic()
    for batch, output in _predictions(engine, batches):
        finite = np.isfinite(output.embedding).all(axis=1)
        store.put(batch.view, batch.rows[finite], output.embedding[finite])
        for row in batch.rows[~finite].tolist():
            store.fail(row, Reason.NON_FINITE.value)
        if batch.view == views - 1:
            store.finish(batch.rows)
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            store.flush()
            flushed = time.monotonic()
    seconds = time.monotonic() - started
    rows = store.rows - rows_before
    _logger.info(
        "embeddings: %d images in %.1f s with %s, %.1f forward passes/s",
        rows,
        seconds,
        describe_engine(engine),
        rows * views / seconds,
    )


def _start_engine(
    bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings, storage: Storage, passes: int
) -> tuple[Engine, int]:
    """Start a tested engine, the configured or the fastest one, and return it with its batch size."""
    conversions = CompileCache.from_cache_dir(settings.cache_dir)
    config = EngineConfig(settings.device, settings.threads, settings.batch_size, conversions)
    choice, batch_size = settings.choice or REFERENCE, settings.batch_size
    if settings.choice is None and passes >= _MIN_PASSES_TO_MEASURE:
        sample = take_sample(manifest.without_kept(), _CALIBRATION_IMAGES, storage)
        prepared = load_sample_pixels(sample, bundle.config.preprocessing, settings.fetch, settings.limits)
        images = CalibrationImages(prepared.pixels, manifest.fingerprint)
        selection = select_engine(
            bundle, images, EngineRequest(device=settings.device), config, _MEASURE_SECONDS
        )
        choice, batch_size = selection.choice, selection.batch_size
    engine, _ = start_tested_engine(bundle, choice, replace(config, batch_size=batch_size))
    return engine, batch_size


def _load_settings(bundle: Bundle, base: str, settings: EmbeddingSettings) -> LoadSettings:
    return LoadSettings(
        base=base,
        fetch=settings.fetch,
        limits=settings.limits,
        preprocessing=bundle.config.preprocessing,
        fetch_threads=_REMOTE_REQUESTS if is_remote(base) else settings.threads,
        decode_threads=settings.threads,
        block_rows=_BLOCK_ROWS,
    )


def read_rows(
    manifest: Manifest, reader: FragmentReader, chosen: npt.NDArray[np.bool_]
) -> Iterator[pa.Table]:
    """Read the chosen rows of a manifest in order; `chosen` has one entry per row."""
    for fragment in manifest.fragments(repeat(_FRAGMENT_ROWS)):
        if not chosen[fragment.first_row : fragment.first_row + fragment.rows].any():
            continue
        for table in reader.read(fragment, _BLOCK_ROWS):
            selected = chosen[table.column(ROW).to_numpy()]
            if selected.any():
                yield table.filter(pa.array(selected))


@dataclass(frozen=True, slots=True)
class _Batch:
    """One forward pass: n row numbers, the index of the view, and the pixels."""

    rows: npt.NDArray[np.int64]
    view: int
    pixels: npt.NDArray[np.uint8]


def _batches(
    blocks: Iterator[pa.Table], preprocessing: Preprocessing, batch_size: int, store: EmbeddingStore
) -> Iterator[_Batch]:
    """Yield every view of the rows that have pixels, and mark the other rows as failed."""
    views = store.values.shape[0]
    for block in blocks:
        failed = block.filter(block.column(PIXELS).is_null())
        for row, reason in zip(*(failed.column(name).to_pylist() for name in (ROW, "reason")), strict=True):
            store.fail(row, reason)
        good = block.filter(block.column(PIXELS).is_valid())
        if good.num_rows == 0:
            continue
        rows, pixels = good.column(ROW).to_numpy(), stack_pixels(good, preprocessing)
        store.put_fingerprints(rows, fingerprint_images(pixels))
        for start in range(0, len(rows), batch_size):
            chunk = pixels[start : start + batch_size]
            for view in range(views):
                yield _Batch(rows[start : start + batch_size], view, chunk[:, :, ::-1] if view else chunk)


def _predictions(engine: Engine, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, EngineOutput]]:
    """Yield batches with their outputs in order; several batches are in flight."""
    pending: deque[_Batch] = deque()

    def pixels() -> Iterator[npt.NDArray[np.uint8]]:
        for batch in batches:
            pending.append(batch)
            yield batch.pixels

    for output in predict_batches(engine, pixels()):
        yield pending.popleft(), output
