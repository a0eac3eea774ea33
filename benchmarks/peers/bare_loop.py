"""Upper bound: the engine and loader of batchcls in one process, without Ray and without committing a run.

    python -m benchmarks.peers.bare_loop --images LIST --bundle FOLDER --output DIR --engine openvino --precision bf16

Threads prefetch decoded batches, and the engine has enough batches in flight to stay busy. The program reports
the time from the start of the engine, and the throughput from its first batch on, which is the reference for the
efficiency of the job.

With `--pillow`, photographs are decoded at full scale and resized by Pillow, as in most programs, with the same
engine.
"""

import argparse
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.models.engines.compile_cache import CompileCache
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig, EngineOutput, PendingOutput
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing, Views
from batchcls.schema import IMAGE, ITEM_ID, PIXELS, ROW, URI
from batchcls.storage.filesystem import Storage
from benchmarks.peers.task import TOP, print_result, read_lines

Pixels = npt.NDArray[np.uint8]
_PREFETCH = 4  # decoded blocks queued for the engine
_CALIBRATION_IMAGES = 128
_PILLOW_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def load(paths: list[str], preprocessing: Preprocessing, batch_size: int, threads: int) -> Iterator[Pixels]:
    """Load batches of N x H x W x 3 pixels with the loader of batchcls, in order.

    The loader is created immediately, because it sets the number of torch threads; the engine must be created
    after it.
    """
    settings = LoadSettings(
        run_id="bare",
        base="/",
        kept=(),
        fetch=FetchPolicy(),
        limits=DecodeLimits(),
        preprocessing=preprocessing,
        views=Views(),
        normalize="engine",
        fetch_threads=2 * threads,
        decode_threads=threads,
        block_rows=batch_size,
    )
    blocks = Loader(settings).load(_tables(paths, batch_size), {})
    return (_pixels(block, preprocessing) for block in blocks)


def _pixels(block: pa.Table, preprocessing: Preprocessing) -> Pixels:
    column = block.column(PIXELS).combine_chunks()
    if column.null_count:
        raise SystemExit(f"{column.null_count} unreadable photographs: {block.column('detail')}")
    return np.frombuffer(column.buffers()[2], np.uint8).reshape(-1, *preprocessing.shape)


def _tables(paths: list[str], batch_size: int) -> Iterator[pa.Table]:
    for start in range(0, len(paths), batch_size):
        uris = paths[start : start + batch_size]
        yield pa.table(
            {
                ROW: pa.array(range(start, start + len(uris)), pa.int64()),
                ITEM_ID: pa.array(uris, pa.string()),
                URI: pa.array(uris, pa.string()),
                IMAGE: pa.nulls(len(uris), pa.binary()),
            }
        )


def load_with_pillow(
    paths: list[str], preprocessing: Preprocessing, batch_size: int, threads: int
) -> Iterator[Pixels]:
    """The same batches, decoded in full with Pillow."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[list[Future[Pixels]]] = deque()
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            pending.append([pool.submit(_load_with_pillow, path, preprocessing) for path in batch])
            if len(pending) > _PREFETCH:
                yield np.stack([future.result() for future in pending.popleft()])
        while pending:
            yield np.stack([future.result() for future in pending.popleft()])


def _load_with_pillow(path: str, preprocessing: Preprocessing) -> Pixels:
    short, crop = preprocessing.resize_height, preprocessing.input_height
    with Image.open(path) as file:
        image = file.convert("RGB")
    shorter_side = min(image.size)
    size = (short * image.width // shorter_side, short * image.height // shorter_side)
    image = image.resize(size, _PILLOW_FILTERS[preprocessing.interpolation])
    left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def prefetch(batches: Iterable[Pixels]) -> Iterator[Pixels]:
    """Prefetch a few batches in a separate thread."""
    queue: Queue[Pixels | BaseException | None] = Queue(_PREFETCH)

    def fill() -> None:
        try:
            for batch in batches:
                queue.put(batch)
            queue.put(None)
        except BaseException as error:  # noqa: BLE001 - raised in the consumer
            queue.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (batch := queue.get()) is not None:
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def predict(engine: Engine, batches: Iterable[Pixels]) -> Iterator[EngineOutput]:
    """Yield outputs in order, with up to `in_flight` batches submitted to the engine."""
    pending: deque[PendingOutput] = deque()
    for pixels in batches:
        pending.append(engine.submit(pixels))
        if len(pending) > engine.in_flight:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def top_five(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Top-5 classes (N x 5) of N x K logits, in descending order, and their probabilities."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    candidates = np.argpartition(-probabilities, TOP - 1, axis=1)[:, :TOP]
    values = np.take_along_axis(probabilities, candidates, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    classes = np.take_along_axis(candidates, order, axis=1)
    return classes.astype(np.int64), np.take_along_axis(values, order, axis=1)


def write(paths: list[str], labels: tuple[str, ...], outputs: list[EngineOutput], output: Path) -> None:
    """Write the top-5 labels of each photograph to a Parquet file."""
    classes, values = top_five(np.concatenate([entry.logits for entry in outputs]))
    offsets = pa.array(np.arange(0, classes.size + 1, TOP, dtype=np.int32))
    names = pa.array(labels).take(pa.array(classes.reshape(-1)))
    columns = {
        "path": pa.array(paths),
        "labels": pa.ListArray.from_arrays(offsets, names),
        "probabilities": pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1), pa.float32())),
    }
    output.mkdir(parents=True)
    pq.write_table(pa.table(columns), output / "predictions.parquet")


def main() -> None:
    """Predict all photographs once and report the time without imports."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("images", "bundle", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--engine", default="torch", help="torch, compile or openvino")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or int8")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=cores, help="threads of the engine")
    parser.add_argument("--decode-threads", type=int, default=cores)
    parser.add_argument("--pillow", action="store_true", help="decode in full and resize with Pillow")
    arguments = parser.parse_args()
    paths = read_lines(arguments.images)
    bundle = Bundle.load(arguments.bundle, Storage())
    read = load_with_pillow if arguments.pillow else load
    batches: Callable[[list[str]], Iterator[Pixels]] = partial(
        read,
        preprocessing=bundle.config.preprocessing,
        batch_size=arguments.batch_size,
        threads=arguments.decode_threads,
    )

    def calibration() -> Pixels:
        return np.concatenate(list(batches(paths[:_CALIBRATION_IMAGES])))

    started = time.perf_counter()
    loading = batches(paths)
    choice = EngineChoice.parse(f"{arguments.engine}:{arguments.precision}")
    config = EngineConfig(
        "cpu", arguments.threads, arguments.batch_size, CompileCache.from_cache_dir(None), calibration
    )
    engine, _ = start_tested_engine(bundle, choice, config)
    engine_ready = time.perf_counter()
    outputs = list(predict(engine, prefetch(loading)))
    write(paths, bundle.config.labels, outputs, Path(arguments.output))
    ended = time.perf_counter()
    rate = len(paths) / (ended - engine_ready)
    print_result(len(paths), ended - started, images_per_second_after_start=round(rate, 2))


if __name__ == "__main__":
    main()
