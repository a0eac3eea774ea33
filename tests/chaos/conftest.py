"""Fixtures of the chaos tests: three nodes on this machine that a test may kill.

BATCHCLS_CHAOS_RUNS is the number of killed runs (default 50), BATCHCLS_CHAOS_SEED the random seed (default 0).
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
    """The number of runs that are killed, and the seed of the moments at which they are killed."""

    runs: int
    seed: int


@pytest.fixture(scope="session")
def chaos() -> Chaos:
    read = os.environ.get
    return Chaos(int(read("BATCHCLS_CHAOS_RUNS", "50")), int(read("BATCHCLS_CHAOS_SEED", "0")))
