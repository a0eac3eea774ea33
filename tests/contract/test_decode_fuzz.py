"""Damaged files yield an image or a reason, never another exception."""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from batchcls.images.formats import Format
from tests.helpers.drawing import draw, encode, samples, transparent
from tests.helpers.fuzzing import LIMITS, outcome

MUTATIONS_PER_FILE = 40
MANY = ("avif", "heic", "webp", "tiff", "bmp")
# Limit for one decode, on a core shared with other processes.
MOST_SECONDS = 5.0
# Limit for 4 concurrent threads: at most 30 bytes per pixel that the limit allows.
MOST_MIB = 4 * 30 * LIMITS.max_pixels / 2**20
# Malicious values of 4-byte fields: zero, too large, negative, slightly too large.
NUMBERS = (0, 1, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(random: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Flip bits, change the header, truncate, mix with another file, zero or repeat a range, or insert a number."""
    mutated = bytearray(data)
    position = int(random.integers(len(data)))
    length = int(random.integers(1, 200))
    match random.integers(7):
        case 0:
            for position in random.integers(0, len(data), int(random.integers(1, 20))):
                mutated[position] ^= 1 << int(random.integers(8))
        case 1:
            for position in random.integers(0, min(128, len(data)), int(random.integers(1, 4))):
                mutated[position] = int(random.integers(256))
        case 2:
            del mutated[position:]
        case 3:
            mutated[:length] = other[:length]
        case 4:
            mutated[position : position + length] = bytes(len(mutated[position : position + length]))
        case 5:
            position = int(random.integers(min(1000, len(data))))
            order = "big" if random.integers(2) else "little"
            mutated[position : position + 4] = NUMBERS[int(random.integers(len(NUMBERS)))].to_bytes(4, order)
        case _:
            mutated[position:position] = mutated[max(0, position - length) : position]
    return bytes(mutated)


@pytest.mark.parametrize("name", samples())
def test_mutated_files_yield_an_image_or_a_reason(name):
    files = samples()
    others = list(files.values())
    random = np.random.default_rng(list(name.encode()))
    for _ in range(MUTATIONS_PER_FILE):
        outcome(mutate(random, files[name], others[int(random.integers(len(others)))]))


def fuzzed(kind: str, count: int) -> Iterator[bytes]:
    """One to three mutations each of small and large files of one format, reproducible by the seed."""
    writer = {"heic": "HEIF"}.get(kind, kind.upper())
    images = [draw(2, 640, 480), draw(3, 333, 251).convert("L")]
    if kind != "bmp":
        images.append(transparent(4).resize((300, 400)))
    originals = [data for name, data in samples().items() if name.split()[0] == kind]
    originals += [encode(image, writer) for image in images]
    others = list(samples().values())
    random = np.random.default_rng(list(kind.encode()))
    for _ in range(count):
        data = originals[int(random.integers(len(originals)))]
        for _ in range(int(random.integers(1, 4))):
            data = mutate(random, data or b"\0", others[int(random.integers(len(others)))])
        yield data


@pytest.mark.parametrize(
    "count", [60, pytest.param(2000, marks=[pytest.mark.chaos, pytest.mark.timeout(1200)])]
)
@pytest.mark.parametrize("kind", MANY)
def test_fuzzed_files_are_accounted_for_in_time_and_memory(kind: str, count: int, tmp_path: Path):
    """Runs in a separate process that has not encoded images, so that the peak is that of decoding."""
    path = tmp_path / "files"
    path.write_bytes(pickle.dumps([samples()[kind], *fuzzed(kind, count)]))
    program = f"from tests.helpers.fuzzing import decode_all; decode_all({str(path)!r})"
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        cwd=repository,
        check=False,
    )
    assert done.returncode == 0, f"the process died ({done.returncode}): {done.stderr[-2000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{count} {Format(kind)}: {found}")
    assert sum(found["outcomes"].values()) == count + 1
    assert {"image", "truncated"} <= set(found["outcomes"])
    assert found["slowest_on_core"] < MOST_SECONDS
    assert found["grown_mib"] < MOST_MIB
