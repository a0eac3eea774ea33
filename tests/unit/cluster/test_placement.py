import pytest

from batchcls.cluster.placement import choose_placement
from batchcls.config.classify_config import ClassifyConfig
from batchcls.ray_runtime import NodeInfo

NODE_ID = "ray.io/node-id"
ACCELERATOR = "ray.io/accelerator-type"


def settings(**values: object) -> ClassifyConfig:
    return ClassifyConfig.model_validate({"manifest": "m", "output": "o", "model": "timm:x", **values})


def node(name: str, cpus: float, gpus: float = 0, *, head: bool = False, **labels: str) -> NodeInfo:
    """A node with the labels that Ray sets itself; in the names of other labels, _ stands for -."""
    others = {key.replace("_", "-"): value for key, value in labels.items()}
    return NodeInfo(cpus, gpus, name, f"host-{name}", {NODE_ID: name} | others, head)


def gpu_node(name: str, cpus: float = 4, kind: str | None = "T4") -> NodeInfo:
    """A node with a GPU, whose type is a label if Ray has detected it."""
    labels = {NODE_ID: name} | ({} if kind is None else {ACCELERATOR: kind})
    return NodeInfo(cpus, 1, name, f"host-{name}", labels)


HEAD = node("head", 4, head=True)


def hosts(nodes: list[NodeInfo] | tuple[NodeInfo, ...]) -> list[str]:
    return [found.node_id for found in nodes]


def test_head_with_cpus_is_left_out_if_there_are_other_nodes():
    placement = choose_placement(settings(), [HEAD, node("a", 2), node("b", 2)])
    assert hosts(placement.nodes) == ["a", "b"]
    assert placement.job == placement.cpu == {NODE_ID: "!in(head)"}
    assert placement.describe("cpu", is_staged=False) == (
        "placement: load and predict on 2 node(s) with 4 CPUs (host-a, host-b), head not used"
    )


@pytest.mark.parametrize(
    ("nodes", "values", "can_grow", "used", "selector"),
    [
        ([HEAD], {}, False, ["head"], {}),
        ([HEAD], {}, True, [], {NODE_ID: "!in(head)"}),
        ([HEAD], {"use_head": True}, True, ["head"], {}),
        ([HEAD, node("a", 2)], {"use_head": True}, False, ["head", "a"], {}),
        # A node without CPUs, such as one that only holds memory, cannot run the job instead of the head.
        ([HEAD, node("memory", 0)], {}, False, ["head", "memory"], {}),
        ([node("head", 0, head=True), node("a", 2)], {}, False, ["a"], {NODE_ID: "!in(head)"}),
    ],
)
def test_head_is_used_on_request_or_if_it_is_the_only_node(
    nodes: list[NodeInfo],
    values: dict[str, object],
    can_grow: bool,
    used: list[str],
    selector: dict[str, str],
):
    placement = choose_placement(settings(**values), nodes, can_grow=can_grow)
    assert hosts(placement.nodes) == used
    assert placement.job == selector


def test_images_are_loaded_on_nodes_without_a_gpu_and_networks_run_on_those_with_one():
    nodes = [HEAD, node("a", 8), node("b", 8), gpu_node("g")]
    placement = choose_placement(settings(), nodes)
    assert hosts(placement.network_nodes("cuda")) == ["g"]
    assert placement.cpu == {NODE_ID: "!in(head)", ACCELERATOR: "!in(T4)"}
    assert placement.network("cuda") == {NODE_ID: "!in(head)"}
    assert placement.describe("cuda", is_staged=True) == (
        "placement: load on 2 node(s) with 16 CPUs (host-a, host-b), predict on 1 node(s) with 4 CPUs, 1 GPUs "
        "(host-g), head not used"
    )
    # --device cpu leaves the GPU nodes to others, too.
    assert hosts(placement.network_nodes("cpu")) == ["a", "b"]


def test_gpu_nodes_with_most_of_the_cpus_load_images_as_well():
    placement = choose_placement(settings(), [HEAD, node("a", 8), gpu_node("g", 96)])
    assert placement.cpu == placement.job == {NODE_ID: "!in(head)"}
    assert hosts(placement.network_nodes("cpu")) == ["a", "g"]


def test_gpu_nodes_of_an_unknown_type_are_excluded_by_their_ids():
    nodes = [HEAD, node("a", 8), gpu_node("g", kind=None), gpu_node("h")]
    assert choose_placement(settings(), nodes).cpu == {NODE_ID: "!in(head, g)", ACCELERATOR: "!in(T4)"}


def test_node_labels_restrict_the_nodes_now_and_later():
    spot, on_demand, unlabeled = node("s", 2, market="spot"), node("d", 2, market="on-demand"), node("u", 2)
    nodes = [HEAD, spot, on_demand, unlabeled]
    placement = choose_placement(settings(node_labels=["market=on-demand"]), nodes)
    assert hosts(placement.nodes) == ["d"]
    assert placement.job == {"market": "on-demand", NODE_ID: "!in(head)"}
    placement = choose_placement(settings(node_labels=["market=!spot"]), nodes)
    assert hosts(placement.nodes) == ["d", "u"]
    assert [placement.allows(found) for found in nodes] == [False, False, True, True]


@pytest.mark.parametrize("label", ["spot", "a=b=c", "=b", "a=", "a=!", "a=in(b, c)", "ray.io/node-id=x"])
def test_invalid_node_labels_are_rejected(label: str):
    with pytest.raises(ValueError, match="label"):
        settings(node_labels=[label])


@pytest.mark.parametrize("values", [{"device": "cpu"}, {"gpus_per_actor": 0}])
def test_required_gpus_contradict_their_absence(values: dict[str, object]):
    with pytest.raises(ValueError, match="contradict"):
        settings(require_gpu=True, **values)
