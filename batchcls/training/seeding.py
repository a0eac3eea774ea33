"""Derives all random numbers of training from the seed of the run and the training position.

Generators keep no state: each one is seeded from the purpose and the position of the random numbers. A run resumed
from a checkpoint therefore draws the same numbers as an undisturbed run, and the augmentation of an image does not
depend on the number of workers or on earlier images.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """Derive a seed from several non-negative integers."""
    words = np.random.SeedSequence(list(parts)).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


@contextmanager
def seeded_random(seed: int) -> Iterator[None]:
    """Seed the CPU generator, which transforms use, inside the block, and restore its state afterwards.

    `torch.manual_seed` would also seed GPUs, which affects dropout. Without a GPU it records its caller, which
    takes 2.5 % of a training on CPUs (docs/measurements).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_device(device: str, seed: int) -> None:
    """Seed the generators of a forward pass, for dropout and stochastic depth, on the CPU and on the device.

    Args:
        device: "cpu", "cuda" or "cuda:0".
        seed: see `derive_seed`.
    """
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
