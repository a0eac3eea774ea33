"""The environment of nodes is repeated in a script, a Dockerfile and a page, which cannot import Python."""

import re

import pytest

from batchcls.ray_runtime import MALLOC_VARIABLES
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("name", ["cluster/local.sh", "cluster/Dockerfile", "docs/how-to/clusters.md"])
def test_every_way_to_start_a_node_sets_the_same_malloc_variables(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    assert dict(re.findall(r"(MALLOC_\w+)=(\w+)", text)) == MALLOC_VARIABLES
