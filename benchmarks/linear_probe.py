"""How long a linear probe of a large catalog takes, and how much memory: synthetic embeddings.

    python -m benchmarks.linear_probe --rows 1000000 --categories 10000 --dimension 512

Clouds around random centers, as float16 in a memory map. Memory is the process's own (RssAnon); pages of
the map that happen to be in memory are not counted. Prints one JSON object.
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

from batchcls.training.linear_probe.embeddings import ManifestEmbeddings
from batchcls.training.linear_probe.fit import LinearSettings, train_linear_probe
from batchcls.training.linear_probe.label_noise import LabelNoise
from batchcls.training.linear_probe.labeled_embeddings import LabeledEmbeddings
from batchcls.training.linear_probe.lda import MiniBatchConfig
from batchcls.training.linear_probe.probe_job import evaluate_head

_WRITTEN_AT_ONCE = 50_000
_SAMPLED_SECONDS = 0.1


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextmanager
def measured(name: str, into: dict[str, Any]) -> Iterator[None]:
    """Measures wall time, CPU time and additional peak memory of a `with` block."""
    before, peak, ended = _anonymous_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLED_SECONDS):
            peak[0] = max(peak[0], _anonymous_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    started, busy = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    into[name] = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "peak_mib": round(max(0.0, peak[0] - before)),
    }
    logging.getLogger(__name__).info("%s: %s", name, into[name])


def write(
    path: Path, classes: np.ndarray[Any, Any], centers: np.ndarray[Any, Any], seed: int
) -> np.ndarray[Any, Any]:
    """1 x N x D embeddings of these classes."""
    random = np.random.default_rng(seed)
    values = np.lib.format.open_memmap(path, "w+", np.float16, (1, len(classes), centers.shape[1]))
    for start in range(0, len(classes), _WRITTEN_AT_ONCE):
        some = classes[start : start + _WRITTEN_AT_ONCE]
        values[0, start : start + len(some)] = centers[some] + random.standard_normal(
            (len(some), centers.shape[1]), np.float32
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
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    random = np.random.default_rng(0)
    centers = random.standard_normal((given.categories, given.dimension), np.float32)
    centers *= 6.0 / np.sqrt(given.dimension)
    found: dict[str, Any] = dict(vars(given))
    with tempfile.TemporaryDirectory(prefix="batchcls-probe-") as folder:
        classes = random.integers(0, given.categories, given.rows).astype(np.int32)
        unseen = random.integers(0, given.categories, given.validation_rows).astype(np.int32)
        with measured("write", found):
            values = write(Path(folder) / "train.npy", classes, centers, 1)
            validation = write(Path(folder) / "validation.npy", unseen, centers, 2)
        examples = LabeledEmbeddings.of(values, np.ones(given.rows, bool), classes, given.categories)
        settings = LinearSettings(threads=given.threads, mini_batch=MiniBatchConfig(given.passes))
        with measured("fit", found):
            probe = train_linear_probe(examples, settings)
        torch.set_num_threads(given.threads)
        seen = ManifestEmbeddings(validation, np.ones(len(unseen), bool), {})
        with measured("predict_and_measure_validation", found), torch.inference_mode():
            found["validation"] = evaluate_head(probe.head, seen, unseen)
        some = examples.where(np.arange(given.rows) < given.validation_rows)
        with measured("label_noise", found), torch.inference_mode():
            judged = LabelNoise.of((probe.head.logits(x), y) for x, y in some.chunks())
            found["confidently_mislabeled"] = int(judged.confident.sum())
    found["method"], found["held_out_top1"] = probe.method, probe.chosen.top1
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
