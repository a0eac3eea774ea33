import pytest

from batchcls.config.classify import ClassifyConfig
from batchcls.errors import InputError
from batchcls.placement import Node, Placement, place

ROWS = 100_000


def shape(nodes: list[Node], rows: int = ROWS, **settings: object) -> Placement:
    config = ClassifyConfig.model_validate({"manifest": "m", "output": "o", "model": "timm:x", **settings})
    return place(config, nodes, rows, remote_images=False)


@pytest.mark.parametrize(
    ("nodes", "device", "actors", "threads"),
    [
        ([Node(1, 0)], "cpu", 1, 1),
        ([Node(2, 0)], "cpu", 1, 2),
        ([Node(8, 0)], "cpu", 1, 8),
        ([Node(8, 0)] * 3, "cpu", 3, 8),
        ([Node(0, 0), Node(4, 0)], "cpu", 1, 4),
        ([Node(96, 8)], "cuda", 8, 1),
        ([Node(16, 0)] * 4 + [Node(8, 1)] * 2, "cuda", 2, 1),
    ],
)
def test_defaults_leave_room_to_load_on_every_kind_of_cluster(
    nodes: list[Node], device: str, actors: int, threads: int
):
    found = shape(nodes)
    assert (found.device, found.num_actors, found.threads_per_actor) == (device, actors, threads)
    held = found.num_actors * found.cpus_per_actor
    assert held + found.cpus_per_load_task <= sum(node.cpus for node in nodes)
    assert found.load_tasks >= 1


def test_gpus_leave_all_cpus_to_decoding():
    found = shape([Node(96, 8)])
    assert (found.cpus_per_actor, found.gpus_per_actor, found.load_tasks) == (0.0, 1.0, 96)


def test_load_and_predict_never_ask_for_the_same_share_on_one_cpu():
    # Ray Data silently runs both in one actor when their resources are equal.
    found = shape([Node(1, 0)])
    assert found.cpus_per_actor != found.cpus_per_load_task


def test_a_block_is_a_whole_number_of_batches():
    for batch in (1, 3, 16, 60, 500):
        found = shape([Node(4, 0)], batch_size=batch)
        assert found.block_rows % batch == 0
        assert found.block_rows >= batch


def test_a_small_manifest_is_spread_over_the_load_tasks():
    found = shape([Node(8, 0)], rows=512)
    assert 512 / found.fragment_rows >= found.load_tasks
    assert shape([Node(8, 0)], rows=10**7).fragment_rows == 1024


@pytest.mark.parametrize(
    ("nodes", "settings", "words"),
    [
        ([Node(2, 0)], {"num_actors": 2, "cpus_per_actor": 1}, ["hold 2 of 2 CPUs", "--num-actors"]),
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
    text = " ".join(shape([Node(8, 0)]).reasons)
    for word in ("8 CPUs", "batches of", "images in flight", "fragments of", "files of"):
        assert word in text
