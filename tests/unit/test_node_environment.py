"""What nodes are started with is written in a script, an image and a page, which cannot import Python."""

import re
from pathlib import Path

import pytest

from batchcls.runtime import KEEP_MEMORY

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


@pytest.mark.parametrize("name", ["local.sh", "Dockerfile", "README.md"])
def test_every_way_to_start_a_node_gives_its_workers_the_same_memory(name):
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert dict(re.findall(r"(MALLOC_\w+)=(\w+)", text)) == KEEP_MEMORY
