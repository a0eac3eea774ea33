"""Validates the RayJob against the definition of KubeRay: unknown names and wrong types are errors."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
RAYJOB = REPOSITORY / "cluster" / "kuberay" / "rayjob.yaml"

Node = dict[str, Any]


def closed(schema: Node) -> Node:
    """The same schema, but it rejects unknown names, which Kubernetes would silently drop.

    Rules in CEL (`x-kubernetes-validations`) are not evaluated. An object without any declared
    properties (metadata, which Kubernetes checks itself) stays open.
    """
    result = dict(schema)
    if "properties" in schema:
        result["properties"] = {name: closed(child) for name, child in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = closed(schema[key])
    if schema.get("x-kubernetes-int-or-string"):
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        result.pop("type", None)
    return result


@pytest.fixture(scope="module")
def validator(shared: Path) -> jsonschema.Draft202012Validator:
    file = shared / "kuberay" / "ray.io_rayjobs.yaml"
    if not file.is_file():
        pytest.skip("KubeRay's definitions are not in ../shared/kuberay")
    with file.open(encoding="utf-8") as text:
        definition = yaml.load(text, yaml.CSafeLoader)
    (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


@pytest.fixture
def rayjob() -> Node:
    loaded: Node = yaml.load(RAYJOB.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return loaded


def _groups(rayjob: Node) -> dict[str, Node]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {
        group["groupName"]: group for group in cluster["workerGroupSpecs"]
    }


def _container(group: Node) -> Node:
    (container,) = group["template"]["spec"]["containers"]
    return container


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def test_rayjob_matches_the_definition(validator: jsonschema.Draft202012Validator, rayjob: Node) -> None:
    assert rayjob["apiVersion"] == "ray.io/v1"
    assert rayjob["kind"] == "RayJob"
    errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(rayjob)]
    assert errors == []


def _misspell_backoff(rayjob: Node) -> None:
    rayjob["spec"]["backofLimit"] = rayjob["spec"].pop("backoffLimit")


def _misspell_deep(rayjob: Node) -> None:
    container = _container(_groups(rayjob)["gpu"])
    container["volumeMount"] = container.pop("volumeMounts")


def _text_for_a_number(rayjob: Node) -> None:
    _groups(rayjob)["cpu"]["replicas"] = "4"


def _number_for_a_text(rayjob: Node) -> None:
    _groups(rayjob)["head"]["rayStartParams"]["num-cpus"] = 0


def _number_with_a_fraction_as_quantity(rayjob: Node) -> None:
    _container(_groups(rayjob)["gpu"])["resources"]["limits"]["cpu"] = 0.5


def _wrong_unit(rayjob: Node) -> None:
    _container(_groups(rayjob)["cpu"])["resources"]["limits"]["memory"] = "24GiB"


def _no_template(rayjob: Node) -> None:
    del _groups(rayjob)["cpu"]["template"]


@pytest.mark.parametrize(
    ("damage", "path"),
    [
        (_misspell_backoff, "$.spec"),
        (_misspell_deep, "$.spec.rayClusterSpec.workerGroupSpecs[1].template.spec.containers[0]"),
        (_text_for_a_number, "$.spec.rayClusterSpec.workerGroupSpecs[0].replicas"),
        (_number_for_a_text, "$.spec.rayClusterSpec.headGroupSpec.rayStartParams"),
        (
            _number_with_a_fraction_as_quantity,
            "$.spec.rayClusterSpec.workerGroupSpecs[1].template.spec.containers[0].resources.limits.cpu",
        ),
        (
            _wrong_unit,
            "$.spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].resources.limits.memory",
        ),
        (_no_template, "$.spec.rayClusterSpec.workerGroupSpecs[0]"),
    ],
)
def test_error_of_an_invalid_copy_contains_the_path(
    validator: jsonschema.Draft202012Validator, rayjob: Node, damage: Callable[[Node], None], path: str
) -> None:
    damage(rayjob)
    paths = [error.json_path for error in validator.iter_errors(rayjob)]
    assert paths
    assert all(found.startswith(path) for found in paths)


def test_the_entrypoint_names_a_job_and_a_configuration_of_this_repository(rayjob: Node) -> None:
    python, option, module, flag, config = rayjob["spec"]["entrypoint"].split()
    assert (python, option, flag) == ("python", "-m", "--config")
    assert importlib.util.find_spec(module) is not None
    assert (REPOSITORY / config).is_file()


def test_nothing_is_scheduled_on_the_head_and_only_one_group_asks_for_gpus(rayjob: Node) -> None:
    groups = _groups(rayjob)
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    gpus = {
        name: _container(group)["resources"]["limits"].get("nvidia.com/gpu") for name, group in groups.items()
    }
    assert gpus == {"head": None, "cpu": None, "gpu": "1"}


def test_every_pod_has_the_same_image_the_stores_keys_and_a_bounded_shared_memory(rayjob: Node) -> None:
    groups = _groups(rayjob)
    assert len({_container(group)["image"] for group in groups.values()}) == 1
    for group in groups.values():
        container = _container(group)
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["batchcls-storage"]
        (volume,) = group["template"]["spec"]["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        # It counts as the container's memory; less than half leaves memory for the processes.
        assert (
            _bytes(volume["emptyDir"]["sizeLimit"]) < _bytes(container["resources"]["limits"]["memory"]) / 2
        )


def test_ray_version_is_that_of_the_image(rayjob: Node) -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={rayjob['spec']['rayClusterSpec']['rayVersion']}\n" in constraints
