"""Tests for the number of training processes per node."""

import pytest

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InsufficientResourcesError
from batchcls.resources import NodeResources
from batchcls.training.scaling import plan_workers


def workers(nodes: list[NodeResources], step_images: int = 32, **changes: object):
    config = FinetuneConfig(manifest="m", validation="v", model="x", output="o", **changes)
    return plan_workers(config, nodes, step_images)


@pytest.mark.parametrize(
    ("nodes", "changes", "count", "cpus", "gpu", "loaders"),
    [
        ([NodeResources(2, 0)], {}, (1, 2, 2), 1, False, 0),
        ([NodeResources(1, 0)], {}, (1, 1, 1), 1, False, 0),
        ([NodeResources(0.5, 0), NodeResources(1, 0)], {}, (1, 1, 1), 1, False, 0),
        ([NodeResources(2, 0)], {"step_images": 31}, (1, 1, 1), 2, False, 0),
        ([NodeResources(2, 0)], {"cpus_per_worker": 2}, (1, 1, 1), 2, False, 0),
        ([NodeResources(8, 0), NodeResources(4, 0)], {}, (1, 2, 2), 4, False, 0),
        ([NodeResources(8, 0), NodeResources(4, 0)], {"step_images": 128}, (1, 8, 8), 1, False, 0),
        ([NodeResources(32, 0), NodeResources(32, 0)], {"step_images": 128}, (1, 8, 8), 8, False, 0),
        ([NodeResources(2, 0)], {"min_workers": 2}, (2, 2, 2), 1, False, 0),
        ([NodeResources(2, 0)], {"max_workers": 1}, (1, 1, 1), 2, False, 0),
        ([NodeResources(2, 0)], {"max_workers": 4}, (1, 4, 2), 1, False, 0),
        ([NodeResources(4, 0)], {"min_workers": 3}, (3, 3, 3), 1, False, 0),
        ([NodeResources(32, 4), NodeResources(8, 0)], {}, (1, 4, 4), 8, True, 8),
        ([NodeResources(32, 4)], {"max_workers": 8}, (1, 8, 4), 8, True, 8),
        ([NodeResources(2, 4)], {}, (1, 4, 4), 0.5, True, 0),
        ([NodeResources(16, 1)], {"device": "cpu"}, (1, 2, 2), 8, False, 0),
        ([NodeResources(16, 1)], {"cpus_per_worker": 3, "loader_processes": 2}, (1, 1, 1), 3, True, 2),
    ],
)
def test_workers_depend_on_the_nodes(nodes, changes, count, cpus, gpu, loaders):
    found = workers(nodes, **changes)
    assert (found.min_workers, found.max_workers, found.available) == count
    assert (found.cpus, found.use_gpu, found.loader_processes) == (cpus, gpu, loaders)
    assert found.resources.get("GPU") == (1 if gpu else None)


@pytest.mark.parametrize(
    ("nodes", "changes", "message", "bundle", "count"),
    [
        ([NodeResources(2, 0)], {"min_workers": 3}, "3 worker.* do not fit.*capacity for 2", {"CPU": 1}, 3),
        ([NodeResources(0, 0)], {"max_workers": 4}, "no node with a CPU", {"CPU": 1}, 1),
        ([], {"min_workers": 2, "cpus_per_worker": 4}, "no node with a CPU", {"CPU": 4}, 2),
        (
            [NodeResources(2, 0)],
            {"device": "cuda", "min_workers": 2},
            "--device cuda: no node",
            {"GPU": 1},
            2,
        ),
        ([NodeResources(2, 0)], {"require_gpu": True}, "--require-gpu: no node", {"GPU": 1}, 1),
        ([NodeResources(8, 1)], {"min_workers": 2}, "CPU and a GPU do not fit", {"CPU": 8, "GPU": 1}, 2),
    ],
)
def test_missing_workers_are_an_error_with_the_resources_to_request(nodes, changes, message, bundle, count):
    with pytest.raises(InsufficientResourcesError, match=message) as error:
        workers(nodes, **changes)
    assert (error.value.bundle, error.value.count) == (bundle, count)


def test_capacity_counts_the_workers_that_fit_on_each_node():
    found = workers([NodeResources(16, 2)], max_workers=8)
    assert found.resources == {"CPU": 8, "GPU": 1}
    nodes = [NodeResources(16, 2), NodeResources(8, 4), NodeResources(64, 0), NodeResources(4, 1)]
    assert found.capacity(nodes) == 2 + 1
    assert found.capacity([]) == 0


def test_more_minimum_than_maximum_workers_are_rejected():
    with pytest.raises(ValueError, match="--min-workers must not be larger than --max-workers"):
        workers([NodeResources(2, 0)], min_workers=4, max_workers=1)
