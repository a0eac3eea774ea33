"""Tests for the number of training processes per node."""

import pytest

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.resources import NodeResources
from batchcls.training.scaling import plan_workers


def workers(nodes: list[NodeResources], step_images: int = 32, **changes: object):
    config = FinetuneConfig(manifest="m", validation="v", model="x", output="o", **changes)
    return plan_workers(config, nodes, step_images)


@pytest.mark.parametrize(
    ("nodes", "changes", "count", "cpus", "gpu", "loaders"),
    [
        ([NodeResources(2, 0)], {}, (2, 2), 1, False, 0),
        ([NodeResources(1, 0)], {}, (1, 1), 1, False, 0),
        ([NodeResources(0.5, 0), NodeResources(1, 0)], {}, (1, 1), 1, False, 0),
        ([NodeResources(2, 0)], {"step_images": 31}, (1, 1), 2, False, 0),
        ([NodeResources(2, 0)], {"cpus_per_worker": 2}, (1, 1), 2, False, 0),
        ([NodeResources(8, 0), NodeResources(4, 0)], {}, (2, 2), 4, False, 0),
        ([NodeResources(8, 0), NodeResources(4, 0)], {"step_images": 128}, (8, 8), 1, False, 0),
        ([NodeResources(32, 0), NodeResources(32, 0)], {"step_images": 128}, (8, 8), 8, False, 0),
        ([NodeResources(2, 0)], {"num_workers": "2"}, (2, 2), 1, False, 0),
        ([NodeResources(2, 0)], {"num_workers": "1-4"}, (1, 4), 0.5, False, 0),
        ([NodeResources(32, 4), NodeResources(8, 0)], {}, (4, 4), 8, True, 8),
        ([NodeResources(16, 1)], {"device": "cpu"}, (2, 2), 8, False, 0),
        ([NodeResources(16, 1)], {"cpus_per_worker": 3, "loader_processes": 2}, (1, 1), 3, True, 2),
    ],
)
def test_workers_depend_on_the_nodes(nodes, changes, count, cpus, gpu, loaders):
    found = workers(nodes, **changes)
    assert (found.min_workers, found.max_workers) == count
    assert (found.cpus, found.use_gpu, found.loader_processes) == (cpus, gpu, loaders)
    assert found.resources.get("GPU") == (1 if gpu else None)


def test_workers_that_do_not_fit_are_rejected():
    with pytest.raises(InputError, match=r"3 worker.* do not fit.*have capacity for 2"):
        workers([NodeResources(2, 0)], num_workers="3", cpus_per_worker=1)
    with pytest.raises(InputError, match="the cluster has no GPU"):
        workers([NodeResources(2, 0)], device="cuda")
    with pytest.raises(ValueError, match="smaller end"):
        workers([NodeResources(2, 0)], num_workers="4-1")
