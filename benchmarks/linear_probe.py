"""Measures time and memory of a linear probe for a large catalog with synthetic embeddings.

    python -m benchmarks.linear_probe --rows 1000000 --categories 10000 --dimension 512

The embeddings are Gaussian clusters around random centers, stored as float16 in a memory map. Memory is the
anonymous memory of the process (RssAnon), which excludes pages of the memory map. Prints one JSON object.
"""

import argparse
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchcls.training.duplicates.fingerprints import FINGERPRINT
from batchcls.training.linear_probe.embeddings import ManifestEmbeddings
from batchcls.training.linear_probe.fit import LinearSettings, train_linear_probe
from batchcls.training.linear_probe.label_noise import LabelNoise
from batchcls.training.linear_probe.labeled_embeddings import LabeledEmbeddings
from batchcls.training.linear_probe.lda import MiniBatchConfig
from batchcls.training.linear_probe.probe_job import evaluate_head

_ROWS_PER_WRITE = 50_000
_SAMPLE_SECONDS = 0.1


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextmanager
def measure(name: str, results: dict[str, Any]) -> Iterator[None]:
    """Measure wall time, CPU time and additional peak memory of a `with` block.

    Args:
        name: key of the measurement.
        results: dictionary that receives it.
    """
    before, peak, ended = _anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], _anonymous_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    started, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    results[name] = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(max(0.0, peak[0] - before)),
    }
    logging.getLogger(__name__).info("%s: %s", name, results[name])


def write(
    path: Path, classes: np.ndarray[Any, Any], centers: np.ndarray[Any, Any], seed: int
) -> np.ndarray[Any, Any]:
    """Write embeddings of the given classes, 1 x N x D float16, and return them as a memory map.

    Args:
        path: npy file to write.
        classes: class index of each row, N.
        centers: center of each class, K x D.
        seed: seed of the noise.
    """
    random = np.random.default_rng(seed)
    values = np.lib.format.open_memmap(path, "w+", np.float16, (1, len(classes), centers.shape[1]))
    for start in range(0, len(classes), _ROWS_PER_WRITE):
        chunk = classes[start : start + _ROWS_PER_WRITE]
        values[0, start : start + len(chunk)] = centers[chunk] + random.standard_normal(
            (len(chunk), centers.shape[1]), np.float32
        )
    values.flush()
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def main() -> None:
    """Generate embeddings, fit, predict, measure, and search for wrong labels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--validation-rows", type=int, default=20_000)
    parser.add_argument("--categories", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument(
        "--passes", type=float, default=1.0, help="passes over the rows after the closed-form solution"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    random = np.random.default_rng(0)
    centers = random.standard_normal((arguments.categories, arguments.dimension), np.float32)
    centers *= 6.0 / np.sqrt(arguments.dimension)
    results: dict[str, Any] = dict(vars(arguments))
    with tempfile.TemporaryDirectory(prefix="batchcls-probe-") as folder:
        classes = random.integers(0, arguments.categories, arguments.rows).astype(np.int32)
        held_out = random.integers(0, arguments.categories, arguments.validation_rows).astype(np.int32)
        with measure("write", results):
            values = write(Path(folder) / "train.npy", classes, centers, 1)
            validation = write(Path(folder) / "validation.npy", held_out, centers, 2)
        examples = LabeledEmbeddings.of(values, np.ones(arguments.rows, bool), classes, arguments.categories)
        settings = LinearSettings(threads=arguments.threads, mini_batch=MiniBatchConfig(arguments.passes))
        with measure("fit", results):
            probe = train_linear_probe(examples, settings)
        torch.set_num_threads(arguments.threads)
        embeddings = ManifestEmbeddings(
            validation, np.ones(len(held_out), bool), {}, np.empty(len(held_out), FINGERPRINT)
        )
        with measure("predict_and_measure_validation", results), torch.inference_mode():
            results["validation"] = evaluate_head(probe.head, embeddings, held_out)
        subset = examples.where(np.arange(arguments.rows) < arguments.validation_rows)
        with measure("label_noise", results), torch.inference_mode():
            noise = LabelNoise.of((probe.head.logits(x), y) for x, y in subset.chunks())
            results["confidently_mislabeled"] = int(noise.confident.sum())
    results["method"], results["held_out_top1"] = probe.method, probe.chosen.top1
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
