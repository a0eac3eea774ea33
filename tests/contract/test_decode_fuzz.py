"""Whatever happens to a file, the answer is a picture or a reason, never another exception."""

import numpy as np
import pytest

from batchcls.images.decode import Decoded, DecodeError, decode
from batchcls.images.limits import DecodeLimits
from batchcls.schema import REASONS, Stage
from tests.drawing import samples

MUTATIONS_PER_FILE = 40
# Small, so that a mutated header cannot make the test slow.
LIMITS = DecodeLimits(max_pixels=4_000_000)


def mutate(random: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """One of: flipped bits, flipped bits in the header, a cut, another file's header, a hole, a part twice."""
    mutated = bytearray(data)
    position = int(random.integers(len(data)))
    length = int(random.integers(1, 200))
    match random.integers(6):
        case 0:
            for place in random.integers(0, len(data), int(random.integers(1, 20))):
                mutated[place] ^= 1 << int(random.integers(8))
        case 1:
            for place in random.integers(0, min(128, len(data)), int(random.integers(1, 4))):
                mutated[place] = int(random.integers(256))
        case 2:
            del mutated[position:]
        case 3:
            mutated[:length] = other[:length]
        case 4:
            mutated[position : position + length] = bytes(len(mutated[position : position + length]))
        case _:
            mutated[position:position] = mutated[max(0, position - length) : position]
    return bytes(mutated)


@pytest.mark.parametrize("name", samples())
def test_mutated_files_give_a_picture_or_a_reason(name):
    files = samples()
    others = list(files.values())
    random = np.random.default_rng(list(name.encode()))
    for _ in range(MUTATIONS_PER_FILE):
        data = mutate(random, files[name], others[int(random.integers(len(others)))])
        try:
            decoded = decode(data, LIMITS)
        except DecodeError as error:
            failure = error.failure
            assert REASONS[failure.reason].stage == Stage.DECODE
            assert 0 < len(failure.detail) < 200
        else:
            assert isinstance(decoded, Decoded)
            assert sorted(decoded.pixels.shape[:2]) == sorted((decoded.width, decoded.height))
