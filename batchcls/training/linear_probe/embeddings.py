"""Computes the embeddings of a manifest with the loader of the main job and stores them on disk.

A frozen network says the same of an image each time, so an image goes through it once, and mirrored
once more where the probe is to learn from both. Other augmentations change the pixels each time and
have no place here.
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

from batchcls.comparison.sample_pixels import prepare, stack_pixels
from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.engine_record import EngineRequest
from batchcls.inference.engine_selection import CalibrationImages, choose
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
from batchcls.training.linear_probe.embedding_store import (
    EmbeddingStore,
    FloatName,
    Shape,
    Values,
    open_store,
)

_logger = logging.getLogger(__name__)

_REMOTE_REQUESTS = 64
_BLOCK_ROWS = 64
_FRAGMENT_ROWS = 2048
_FLUSH_SECONDS = 20.0
# Below, measuring engines and converting networks takes longer than it saves.
_MEASURE_FROM_PASSES = 2000
_MEASURE_IMAGES = 128
_MEASURE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """How embeddings are made and where they are kept.

    Attributes:
        fetch: how images are read.
        limits: which are refused.
        mirrored: embed each image flipped left to right, too.
        dtype: what the values are kept in; float16 has three digits and half the size.
        choice: what runs the network; None: measured here, where there are thousands of images.
        device: where it runs.
        threads: cores for decoding and for the network.
        batch_size: images of a forward pass, unless it is measured with the engine.
        cache_dir: folder of this machine; None: as `CompileCache.from_cache_dir`.
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
        """Where embeddings are kept: beside the converted networks."""
        return CompileCache.from_cache_dir(self.cache_dir).folder.parent / "embeddings"


@dataclass(frozen=True, slots=True)
class Embedded:
    """The embeddings of a manifest.

    Attributes:
        values: V x N x D, mapped from disk; V is 1, or 2 with the mirrored images last.
        good: N, which rows have embeddings.
        failures: the other rows, by reason.
    """

    values: Values
    good: npt.NDArray[np.bool_]
    failures: dict[str, int]


def embed(
    bundle: Bundle,
    manifest: Manifest,
    settings: EmbeddingSettings,
    storage: Storage,
    watch: Callable[[EmbeddingStore], object] | None = None,
) -> Embedded:
    """The embedding of every row's image, from disk as far as they are there.

    An image that fails has none, and is counted by its reason. What was fetched in vain is tried
    again the next time.

    Args:
        bundle: whose `embedding_tap` is taken, in evaluation mode.
        manifest: the rows; row n of the result is row n of the snapshot.
        settings: how and where.
        storage: how to reach the manifest.
        watch: is given the store before work begins, and may ask it how far it is, from any thread.

    Raises:
        InputError: the bundle does not hold together, the engine cannot be had, or the disk refuses.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    shape = Shape(
        2 if settings.mirrored else 1, manifest.rows, bundle.config.embedding_dimension, settings.dtype
    )
    with open_store(settings.folder, _key(bundle, manifest, settings), shape) as store:
        if watch is not None:
            watch(store)
        if store.to_do.any():
            with _torch_threads_kept():
                _fill(store, bundle, manifest, settings, storage)
        else:
            _logger.info("reused the embeddings of %d rows: %s", manifest.rows, store.folder)
        return Embedded(store.values, store.good, dict(store.failures))


def _key(bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings) -> dict[str, object]:
    """All that an embedding depends on; the images themselves by the manifest's state only.

    Not the bundle's fingerprint: labels and golden answers change nothing about an embedding.
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
def _torch_threads_kept() -> Iterator[None]:
    """Engines and loaders set the threads of the whole process."""
    before, arrow = torch.get_num_threads(), pa.cpu_count()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        pa.set_cpu_count(arrow)


def _fill(
    store: EmbeddingStore, bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings, storage: Storage
) -> None:
    """Embed what is to do, fragment by fragment."""
    to_do, before, views = store.to_do, store.rows, store.values.shape[0]
    engine, batch_size = _start(bundle, manifest, settings, storage, int(to_do.sum()) * views)
    loader = Loader(_load_settings(bundle, manifest, settings))
    blocks = loader.load(_tables(manifest, FragmentReader(manifest.columns, storage), to_do), {})
    batches = _batches(blocks, bundle.config.preprocessing, batch_size, store)
    started = flushed = time.monotonic()
    for batch, answer in _answered(engine, batches):
        finite = np.isfinite(answer.embedding).all(axis=1)
        store.put(batch.view, batch.rows[finite], answer.embedding[finite])
        for row in batch.rows[~finite].tolist():
            store.fail(row, Reason.NON_FINITE.value)
        if batch.view == views - 1:
            store.finish(batch.rows)
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            store.flush()
            flushed = time.monotonic()
    seconds = time.monotonic() - started
    done = store.rows - before
    _logger.info(
        "embeddings: %d images in %.1f s with %s, %.1f forward passes a second",
        done,
        seconds,
        describe_engine(engine),
        done * views / seconds,
    )


def _start(
    bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings, storage: Storage, passes: int
) -> tuple[Engine, int]:
    """A tested engine and its batch size: as asked for, or the fastest here if there is much to do."""
    conversions = CompileCache.from_cache_dir(settings.cache_dir)
    place = EngineConfig(settings.device, settings.threads, settings.batch_size, conversions)
    choice, batch_size = settings.choice or REFERENCE, settings.batch_size
    if settings.choice is None and passes >= _MEASURE_FROM_PASSES:
        sample = take_sample(manifest.without_kept(), _MEASURE_IMAGES, storage)
        prepared = prepare(sample, bundle.config.preprocessing, settings.fetch, settings.limits)
        images = CalibrationImages(prepared.pixels, manifest.fingerprint)
        measured = choose(bundle, images, EngineRequest(device=settings.device), place, _MEASURE_SECONDS)
        choice, batch_size = measured.choice, measured.batch_size
    engine, _ = start_tested_engine(bundle, choice, replace(place, batch_size=batch_size))
    return engine, batch_size


def _load_settings(bundle: Bundle, manifest: Manifest, settings: EmbeddingSettings) -> LoadSettings:
    return LoadSettings(
        base=manifest.base,
        fetch=settings.fetch,
        limits=settings.limits,
        preprocessing=bundle.config.preprocessing,
        fetch_threads=_REMOTE_REQUESTS if is_remote(manifest.base) else settings.threads,
        decode_threads=settings.threads,
        block_rows=_BLOCK_ROWS,
    )


def _tables(manifest: Manifest, reader: FragmentReader, to_do: npt.NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The rows that are to do, in order."""
    for fragment in manifest.fragments(repeat(_FRAGMENT_ROWS)):
        if not to_do[fragment.first_row : fragment.first_row + fragment.rows].any():
            continue
        for table in reader.read(fragment, _BLOCK_ROWS):
            wanted = to_do[table.column(ROW).to_numpy()]
            if wanted.any():
                yield table.filter(pa.array(wanted))


@dataclass(frozen=True, slots=True)
class _Batch:
    """One forward pass: n row numbers, which view of them, and their pixels."""

    rows: npt.NDArray[np.int64]
    view: int
    pixels: npt.NDArray[np.uint8]


def _batches(
    blocks: Iterator[pa.Table], preprocessing: Preprocessing, batch_size: int, store: EmbeddingStore
) -> Iterator[_Batch]:
    """Every view of the rows that have pixels; rows without are marked as failed."""
    views = store.values.shape[0]
    for block in blocks:
        failed = block.filter(block.column(PIXELS).is_null())
        for row, reason in zip(*(failed.column(name).to_pylist() for name in (ROW, "reason")), strict=True):
            store.fail(row, reason)
        good = block.filter(block.column(PIXELS).is_valid())
        if good.num_rows == 0:
            continue
        rows, pixels = good.column(ROW).to_numpy(), stack_pixels(good, preprocessing)
        for start in range(0, len(rows), batch_size):
            seen = pixels[start : start + batch_size]
            for view in range(views):
                yield _Batch(rows[start : start + batch_size], view, seen[:, :, ::-1] if view else seen)


def _answered(engine: Engine, batches: Iterator[_Batch]) -> Iterator[tuple[_Batch, EngineOutput]]:
    """Batches with their answers, in order, as many in flight as keep the engine busy."""
    asked: deque[_Batch] = deque()

    def pixels() -> Iterator[npt.NDArray[np.uint8]]:
        for batch in batches:
            asked.append(batch)
            yield batch.pixels

    for answer in predict_batches(engine, pixels()):
        yield asked.popleft(), answer
