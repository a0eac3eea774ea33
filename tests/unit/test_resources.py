from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError, InsufficientResourcesError
from batchcls.resources import NodeResources, ResourcePlan, fragment_sizes, plan_resources

ROWS = 100_000


def plan(nodes: list[NodeResources], rows: int = ROWS, **settings: object) -> ResourcePlan:
    config = ClassifyConfig.model_validate({"manifest": "m", "output": "o", "model": "timm:x", **settings})
    return plan_resources(config, nodes, rows, remote_images=False)


@pytest.mark.parametrize(
    ("nodes", "actors", "cpus", "threads"),
    [
        ([NodeResources(1, 0)], 1, 1, 1),
        ([NodeResources(2, 0)], 1, 2, 2),
        ([NodeResources(8, 0)], 1, 8, 8),
        ([NodeResources(12, 0)], 2, 6, 6),
        ([NodeResources(64, 0)], 8, 8, 8),
        ([NodeResources(8, 0)] * 3, 3, 8, 8),
        ([NodeResources(4, 0), NodeResources(8, 0)], 3, 4, 4),
        ([NodeResources(0, 0), NodeResources(4, 0)], 1, 4, 4),
    ],
)
def test_without_gpu_fused_actors_share_all_cpus(
    nodes: list[NodeResources], actors: int, cpus: float, threads: int
):
    found = plan(nodes)
    assert (found.shape, found.device, found.load_tasks) == ("fused", "cpu", 0)
    assert (found.num_actors, found.cpus_per_actor) == (actors, cpus)
    # As many threads for decoding as for the network: decoding runs while the network waits for images, so that no
    # more threads compute at a time than Ray has reserved CPUs.
    assert (found.threads_per_actor, found.decode_threads) == (threads, threads)
    assert found.num_actors * found.threads_per_actor <= sum(node.cpus for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "settings", "device", "actors", "threads"),
    [
        ([NodeResources(1, 0)], {"shape": "staged"}, "cpu", 1, 1),
        ([NodeResources(2, 0)], {"shape": "staged"}, "cpu", 1, 2),
        ([NodeResources(8, 0)] * 3, {"shape": "staged"}, "cpu", 3, 8),
        ([NodeResources(96, 8)], {}, "cuda", 8, 1),
        ([NodeResources(16, 0)] * 4 + [NodeResources(8, 1)] * 2, {}, "cuda", 2, 1),
    ],
)
def test_staged_shape_leaves_cpus_for_loading(
    nodes: list[NodeResources], settings: dict[str, object], device: str, actors: int, threads: int
):
    found = plan(nodes, **settings)
    assert (found.shape, found.device) == ("staged", device)
    assert (found.num_actors, found.threads_per_actor) == (actors, threads)
    reserved = found.num_actors * found.cpus_per_actor
    assert reserved + found.cpus_per_load_task <= sum(node.cpus for node in nodes)
    assert found.load_tasks >= 1


@given(
    rows=st.integers(1, 300_000),
    cpus=st.integers(1, 64),
    nodes=st.integers(1, 8),
    fragment_rows=st.one_of(st.none(), st.integers(32, 10_000)),
)
@settings(deadline=None, max_examples=50)
def test_fragments_start_small_stay_bounded_and_shrink_toward_the_end(
    rows: int, cpus: int, nodes: int, fragment_rows: int | None
):
    settings = {} if fragment_rows is None else {"fragment_rows": fragment_rows}
    found = plan([NodeResources(cpus, 0)] * nodes, rows, **settings)
    sizes, remaining = [], rows
    for size in fragment_sizes(rows, found):
        sizes.append(min(size, remaining))
        remaining -= size
        if remaining <= 0:
            break
    assert sum(sizes) == rows
    assert 1 <= max(sizes) <= found.fragment_rows == (fragment_rows or 2048)
    assert sizes[0] <= 64
    assert sizes[-1] <= min(64, found.fragment_rows)
    assert all(later <= 2 * size for size, later in zip(sizes, sizes[found.num_actors :], strict=False))


def test_fragments_double_after_one_per_actor():
    sizes = fragment_sizes(10_000_000, plan([NodeResources(8, 0)] * 4, 10_000_000))
    assert list(islice(sizes, 24)) == [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4 + [1024] * 4 + [2048] * 4


def test_gpu_actors_reserve_no_cpu():
    found = plan([NodeResources(96, 8)])
    assert (found.cpus_per_actor, found.gpus_per_actor, found.load_tasks) == (0.0, 1.0, 96)


def test_load_tasks_and_actors_reserve_different_shares_of_one_cpu():
    # Ray Data fuses two stages into one actor when their resources are equal.
    found = plan([NodeResources(1, 0)], shape="staged")
    assert found.cpus_per_actor != found.cpus_per_load_task


def test_block_size_is_a_multiple_of_batch_size():
    for batch in (1, 3, 16, 60, 500):
        found = plan([NodeResources(4, 0)], batch_size=batch)
        assert found.block_rows % batch == 0
        assert found.block_rows >= batch


def test_small_manifest_is_divided_among_all_load_tasks():
    found = plan([NodeResources(8, 0)], rows=512, shape="staged")
    assert 512 / found.fragment_rows >= found.load_tasks
    assert plan([NodeResources(8, 0)], rows=10**7, shape="staged").fragment_rows == 1024


@pytest.mark.parametrize(
    ("nodes", "settings", "words"),
    [
        (
            [NodeResources(2, 0)],
            {"shape": "staged", "max_actors": 2, "cpus_per_actor": 1},
            ["hold 2 of 2 CPUs", "leave none for loading", "--max-actors"],
        ),
        ([NodeResources(2, 0)], {"min_actors": 1, "cpus_per_actor": 4}, ["do not fit", "--cpus-per-actor"]),
        ([NodeResources(4, 0)], {"device": "cuda"}, ["no GPU", "--device"]),
        ([NodeResources(4, 1)], {"min_actors": 2}, ["do not fit", "--gpus-per-actor"]),
        ([NodeResources(0, 0)], {}, ["no node with a CPU", "--use-head", "--node-labels"]),
        ([NodeResources(4, 0)], {"require_gpu": True}, ["--require-gpu", "no GPU"]),
    ],
)
def test_unschedulable_settings_are_rejected_with_remedy(
    nodes: list[NodeResources], settings: dict[str, object], words: list[str]
):
    with pytest.raises(InputError) as caught:
        plan(nodes, **settings)
    for word in words:
        assert word in str(caught.value)


def test_two_actors_can_share_a_gpu():
    found = plan([NodeResources(8, 1)], gpus_per_actor=0.5)
    assert (found.num_actors, found.gpus_per_actor) == (2, 0.5)


def test_reasons_explain_the_numbers():
    text = " ".join(plan([NodeResources(8, 0)], shape="staged").reasons)
    for word in ("8 CPUs", "images in flight", "fragments of", "files of"):
        assert word in text
    text = " ".join(plan([NodeResources(8, 0)]).reasons)
    for word in ("8 CPUs", "8 thread(s)", "images in flight", "files of up to 2048 rows"):
        assert word in text


@pytest.mark.parametrize(
    "nodes",
    [
        [NodeResources(1, 0)] * 3,
        [NodeResources(2, 0)] * 4,
        [NodeResources(0, 0), NodeResources(1, 0), NodeResources(1, 0)],
    ],
)
def test_load_task_fits_on_one_node_with_the_actors(nodes: list[NodeResources]):
    """Actors on three nodes with one CPU each leave more than one CPU in total, but no node with a whole free CPU."""
    found = plan(nodes, shape="staged")
    with_cpus = [node for node in nodes if node.cpus]
    reserved = -(-found.num_actors // len(with_cpus)) * found.cpus_per_actor
    assert max(node.cpus for node in with_cpus) - reserved >= found.cpus_per_load_task


def test_images_are_loaded_on_the_cpus_of_nodes_without_a_gpu():
    found = plan([NodeResources(16, 0)] * 4 + [NodeResources(8, 1)] * 2)
    assert (found.device, found.num_actors, found.load_tasks) == ("cuda", 2, 64)
    found = plan([NodeResources(16, 0), NodeResources(8, 1)], device="cpu")
    assert (found.num_actors, found.cpus_per_actor) == (2, 8)
    # Two small nodes could not feed a large machine with GPUs.
    found = plan([NodeResources(8, 0)] * 2 + [NodeResources(96, 8)])
    assert (found.num_actors, found.load_tasks) == (8, 112)


def test_required_gpu_is_used_like_any_other():
    assert plan([NodeResources(8, 1)], require_gpu=True) == plan([NodeResources(8, 1)])


@pytest.mark.parametrize(
    ("nodes", "settings", "bundle"),
    [
        ([NodeResources(4, 0)], {"device": "cuda"}, {"GPU": 1}),
        ([NodeResources(4, 0)], {"require_gpu": True}, {"GPU": 1}),
        # GPU nodes without CPUs cannot load images.
        ([NodeResources(0, 1)], {}, {"CPU": 0.5}),
        ([], {}, {"CPU": 1}),
    ],
)
def test_missing_resources_are_those_to_request(
    nodes: list[NodeResources], settings: dict[str, object], bundle: dict[str, float]
):
    with pytest.raises(InsufficientResourcesError) as caught:
        plan(nodes, **settings)
    assert caught.value.bundle == bundle
