"""Derives all random numbers of training from the seed of the run and the training position.

No generator's state is kept: whoever draws is seeded first, by what is drawn for. So a run that resumes from
a checkpoint draws what the undisturbed run would have drawn, and what is seen of an image does not depend on
how many workers there are or on what came before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int) -> int:
    """One seed out of several numbers, none of them negative; any change gives another one."""
    words = np.random.SeedSequence(list(parts)).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


@contextmanager
def seeded_random(seed: int) -> Iterator[None]:
    """Those of this seed, on the CPU, where transforms draw them; afterwards the process continues with its own.

    `torch.manual_seed` would seed GPUs as well, for whatever else draws there, and where there is none it writes
    down who called it: 2.5 % of a training on CPUs (docs/measurements).
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_device(device: str, seed: int) -> None:
    """Seed what a network draws from in a forward pass: dropout and stochastic depth, on CPU and this device.

    Args:
        device: "cpu", "cuda" or "cuda:0".
        seed: see `derive_seed`.
    """
    torch.default_generator.manual_seed(seed)
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
