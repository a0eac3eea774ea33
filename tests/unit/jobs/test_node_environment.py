"""What nodes are started with is written in a script, an image and a page, which cannot import Python."""

import re

import pytest

from batchcls.ray_runtime import MALLOC_VARIABLES
from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"


@pytest.mark.parametrize("name", ["local.sh", "Dockerfile", "README.md"])
def test_every_way_to_start_a_node_gives_its_workers_the_same_memory(name):
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert dict(re.findall(r"(MALLOC_\w+)=(\w+)", text)) == MALLOC_VARIABLES
