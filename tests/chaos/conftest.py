"""Three nodes on this machine that may be killed, and the main job as a process that may be killed.

How often: BATCHCLS_CHAOS_RUNS (50 by `make chaos`), from a seed: BATCHCLS_CHAOS_SEED (0).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.helpers.nodes import ThreeNodes
from tests.integration.conftest import make_bundle, tiny_bundle

__all__ = ["chaos", "make_bundle", "nodes", "tiny_bundle"]


@pytest.fixture(scope="module")
def nodes(clean_environment: dict[str, str]) -> Iterator[ThreeNodes]:
    started = ThreeNodes(clean_environment)
    try:
        yield started
    finally:
        started.end()


@dataclass(frozen=True)
class Chaos:
    """How many runs are killed, and the seed of the moments."""

    runs: int
    seed: int


@pytest.fixture(scope="session")
def chaos() -> Chaos:
    read = os.environ.get
    return Chaos(int(read("BATCHCLS_CHAOS_RUNS", "50")), int(read("BATCHCLS_CHAOS_SEED", "0")))
