"""Three nodes on this machine that may be killed, and the main job as a process that may be killed.

How often: BATCHCLS_CHAOS_RUNS (50 by `make chaos`), from a seed: BATCHCLS_CHAOS_SEED (0).
"""

import os
from collections.abc import Iterator

import pytest

from tests.chaos.nodes import ThreeNodes
from tests.integration.conftest import make_bundle, tiny_bundle

__all__ = ["chaos_runs", "chaos_seed", "make_bundle", "nodes", "tiny_bundle"]


@pytest.fixture(scope="module")
def nodes(clean_environment: dict[str, str]) -> Iterator[ThreeNodes]:
    started = ThreeNodes(clean_environment)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="session")
def chaos_runs() -> int:
    return int(os.environ.get("BATCHCLS_CHAOS_RUNS", "50"))


@pytest.fixture(scope="session")
def chaos_seed() -> int:
    return int(os.environ.get("BATCHCLS_CHAOS_SEED", "0"))
