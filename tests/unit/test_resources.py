from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchcls.config.classify_config import ClassifyConfig
from batchcls.errors import InputError
from batchcls.resources import Node, ResourcePlan, fragment_sizes, plan_resources

ROWS = 100_000


def shape(nodes: list[Node], rows: int = ROWS, **settings: object) -> ResourcePlan:
    config = ClassifyConfig.model_validate({"manifest": "m", "output": "o", "model": "timm:x", **settings})
    return plan_resources(config, nodes, rows, remote_images=False)


@pytest.mark.parametrize(
    ("nodes", "actors", "cpus", "threads"),
    [
        ([Node(1, 0)], 1, 1, 1),
        ([Node(2, 0)], 1, 2, 2),
        ([Node(8, 0)], 1, 8, 8),
        ([Node(12, 0)], 2, 6, 6),
        ([Node(64, 0)], 8, 8, 8),
        ([Node(8, 0)] * 3, 3, 8, 8),
        ([Node(4, 0), Node(8, 0)], 3, 4, 4),
        ([Node(0, 0), Node(4, 0)], 1, 4, 4),
    ],
)
def test_without_a_gpu_actors_share_all_cpus_and_each_does_everything(
    nodes: list[Node], actors: int, cpus: float, threads: int
):
    found = shape(nodes)
    assert (found.shape, found.device, found.load_tasks) == ("fused", "cpu", 0)
    assert (found.num_actors, found.cpus_per_actor) == (actors, cpus)
    # No more threads that compute at a time than Ray has set CPUs aside for: those of the network, and as
    # many that decode while the network waits for them.
    assert (found.threads_per_actor, found.decode_threads) == (threads, threads)
    assert found.num_actors * found.threads_per_actor <= sum(node.cpus for node in nodes)


@pytest.mark.parametrize(
    ("nodes", "settings", "device", "actors", "threads"),
    [
        ([Node(1, 0)], {"shape": "staged"}, "cpu", 1, 1),
        ([Node(2, 0)], {"shape": "staged"}, "cpu", 1, 2),
        ([Node(8, 0)] * 3, {"shape": "staged"}, "cpu", 3, 8),
        ([Node(96, 8)], {}, "cuda", 8, 1),
        ([Node(16, 0)] * 4 + [Node(8, 1)] * 2, {}, "cuda", 2, 1),
    ],
)
def test_the_staged_shape_leaves_room_to_load_on_every_kind_of_cluster(
    nodes: list[Node], settings: dict[str, object], device: str, actors: int, threads: int
):
    found = shape(nodes, **settings)
    assert (found.shape, found.device) == ("staged", device)
    assert (found.num_actors, found.threads_per_actor) == (actors, threads)
    held = found.num_actors * found.cpus_per_actor
    assert held + found.cpus_per_load_task <= sum(node.cpus for node in nodes)
    assert found.load_tasks >= 1


@given(
    rows=st.integers(1, 300_000),
    cpus=st.integers(1, 64),
    nodes=st.integers(1, 8),
    most=st.one_of(st.none(), st.integers(32, 10_000)),
)
@settings(deadline=None, max_examples=50)
def test_fragments_begin_small_stay_bounded_and_shrink_towards_the_end(
    rows: int, cpus: int, nodes: int, most: int | None
):
    found = shape([Node(cpus, 0)] * nodes, rows, **({} if most is None else {"fragment_rows": most}))
    sizes, left = [], rows
    for size in fragment_sizes(rows, found):
        sizes.append(min(size, left))
        left -= size
        if left <= 0:
            break
    assert sum(sizes) == rows
    assert 1 <= max(sizes) <= found.fragment_rows == (most or 2048)
    assert sizes[0] <= 64
    assert sizes[-1] <= min(64, found.fragment_rows)
    assert all(later <= 2 * size for size, later in zip(sizes, sizes[found.num_actors :], strict=False))


def test_a_large_run_has_large_fragments():
    sizes = fragment_sizes(10_000_000, shape([Node(8, 0)] * 4, 10_000_000))
    assert list(islice(sizes, 24)) == [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4 + [1024] * 4 + [2048] * 4


def test_gpus_leave_all_cpus_to_decoding():
    found = shape([Node(96, 8)])
    assert (found.cpus_per_actor, found.gpus_per_actor, found.load_tasks) == (0.0, 1.0, 96)


def test_load_and_predict_never_ask_for_the_same_share_on_one_cpu():
    # Ray Data silently runs both in one actor when their resources are equal.
    found = shape([Node(1, 0)], shape="staged")
    assert found.cpus_per_actor != found.cpus_per_load_task


def test_a_block_is_a_whole_number_of_batches():
    for batch in (1, 3, 16, 60, 500):
        found = shape([Node(4, 0)], batch_size=batch)
        assert found.block_rows % batch == 0
        assert found.block_rows >= batch


def test_a_small_manifest_is_spread_over_the_load_tasks():
    found = shape([Node(8, 0)], rows=512, shape="staged")
    assert 512 / found.fragment_rows >= found.load_tasks
    assert shape([Node(8, 0)], rows=10**7, shape="staged").fragment_rows == 1024


@pytest.mark.parametrize(
    ("nodes", "settings", "words"),
    [
        (
            [Node(2, 0)],
            {"shape": "staged", "num_actors": 2, "cpus_per_actor": 1},
            ["hold 2 of 2 CPUs", "--num-actors"],
        ),
        ([Node(2, 0)], {"num_actors": 1, "cpus_per_actor": 4}, ["do not fit", "--cpus-per-actor"]),
        ([Node(4, 0)], {"device": "cuda"}, ["no GPU", "--device"]),
        ([Node(4, 1)], {"num_actors": 2}, ["do not fit", "--gpus-per-actor"]),
        ([Node(0, 0)], {}, ["no node with a CPU"]),
    ],
)
def test_what_cannot_be_scheduled_is_refused_with_the_remedy(
    nodes: list[Node], settings: dict[str, object], words: list[str]
):
    with pytest.raises(InputError) as caught:
        shape(nodes, **settings)
    for word in words:
        assert word in str(caught.value)


def test_two_actors_may_share_a_gpu():
    found = shape([Node(8, 1)], gpus_per_actor=0.5)
    assert (found.num_actors, found.gpus_per_actor) == (2, 0.5)


def test_the_arithmetic_is_said():
    text = " ".join(shape([Node(8, 0)], shape="staged").reasons)
    for word in ("8 CPUs", "images in flight", "fragments of", "files of"):
        assert word in text
    text = " ".join(shape([Node(8, 0)]).reasons)
    for word in ("8 CPUs", "8 thread(s)", "images in flight", "files of up to 2048 rows"):
        assert word in text


@pytest.mark.parametrize("nodes", [[Node(1, 0)] * 3, [Node(2, 0)] * 4, [Node(0, 0), Node(1, 0), Node(1, 0)]])
def test_a_load_task_fits_on_a_node_whichever_the_actors_stand_on(nodes: list[Node]):
    """Actors on three nodes of one CPU each leave more than one CPU in all, and no node where a whole one is free."""
    found = shape(nodes, shape="staged")
    able = [node for node in nodes if node.cpus]
    on_each = -(-found.num_actors // len(able)) * found.cpus_per_actor
    assert max(node.cpus for node in able) - on_each >= found.cpus_per_load_task
