"""Validates cluster/kuberay against the definitions of KubeRay and the schemas of Kubernetes: unknown names and wrong
types are errors, as are differences between the files that describe the same cluster."""

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from batchcls.errors import ExitCode
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "cluster" / "kuberay"
RAY = {"RayJob": "rayjob", "RayCluster": "raycluster", "RayCronJob": "raycronjob"}
PART_OF = {"app.kubernetes.io/part-of": "batchcls"}

Node = dict[str, Any]


def load(name: str) -> list[Node]:
    """The documents of a file."""
    return list(yaml.load_all((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader))


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
def errors_of(shared: Path) -> Callable[[Node], list[tuple[str, str]]]:
    """Return a function that validates a resource of KubeRay and returns path and message of every error."""
    validators: dict[str, jsonschema.Draft202012Validator] = {}
    for kind, name in RAY.items():
        file = shared / "kuberay" / f"ray.io_{name}s.yaml"
        if not file.is_file():
            pytest.skip("KubeRay's definitions are not in ../shared/kuberay")
        with file.open(encoding="utf-8") as text:
            definition = yaml.load(text, yaml.CSafeLoader)
        (version,) = (version for version in definition["spec"]["versions"] if version["name"] == "v1")
        validators[kind] = jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))

    def check(resource: Node) -> list[tuple[str, str]]:
        found = validators[resource["kind"]].iter_errors(resource)
        return [(error.json_path, error.message) for error in found]

    return check


@pytest.fixture
def rayjob() -> Node:
    (loaded,) = load("rayjob")
    return loaded


def _cluster(resource: Node) -> Node:
    spec = resource["spec"]
    return spec if resource["kind"] == "RayCluster" else spec.get("jobTemplate", spec)["rayClusterSpec"]


def _groups(resource: Node) -> dict[str, Node]:
    cluster = _cluster(resource)
    return {"head": cluster["headGroupSpec"]} | {
        group["groupName"]: group for group in cluster["workerGroupSpecs"]
    }


def _container(group: Node) -> Node:
    (container,) = group["template"]["spec"]["containers"]
    return container


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


def _pod_templates() -> Iterator[tuple[str, Node]]:
    """Every template of a pod in the folder, by file and group."""
    for name in RAY.values():
        (resource,) = load(name)
        for group, spec in _groups(resource).items():
            yield f"{name}-{group}", spec["template"]
        job = resource["spec"].get("jobTemplate", resource["spec"])
        if "submitterPodTemplate" in job:
            yield f"{name}-submitter", job["submitterPodTemplate"]
    (cronjob,) = load("cronjob")
    yield "cronjob-submit", cronjob["spec"]["jobTemplate"]["spec"]["template"]


TEMPLATES = dict(_pod_templates())


@pytest.mark.parametrize(("kind", "name"), RAY.items())
def test_ray_resource_matches_its_definition(
    errors_of: Callable[[Node], list[tuple[str, str]]], kind: str, name: str
) -> None:
    (resource,) = load(name)
    assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", kind)
    assert errors_of(resource) == []


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


def _unknown_autoscaler(rayjob: Node) -> None:
    _cluster(rayjob)["autoscalerOptions"]["version"] = "v3"


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
        (_unknown_autoscaler, "$.spec.rayClusterSpec.autoscalerOptions.version"),
    ],
)
def test_error_of_an_invalid_copy_contains_the_path(
    errors_of: Callable[[Node], list[tuple[str, str]]],
    rayjob: Node,
    damage: Callable[[Node], None],
    path: str,
) -> None:
    damage(rayjob)
    paths = [found for found, _ in errors_of(rayjob)]
    assert paths
    assert all(found.startswith(path) for found in paths)


# The versions of Kubernetes that are maintained; a field that one of them does not know is an error.
@pytest.mark.parametrize("version", ["1.34", "1.37"])
def test_resources_and_pods_match_the_schemas_of_kubernetes(version: str) -> None:
    resources = [*load("common"), *load("cronjob")]
    assert [resource["kind"] for resource in resources] == ["ServiceAccount", "NetworkPolicy", "CronJob"]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in TEMPLATES.values()]
    for resource in (*resources, *pods):
        assert kubernetes_validate.validate(resource, version, strict=True) == version


def test_kubernetes_rejects_a_misspelled_name() -> None:
    template = yaml.safe_load(yaml.safe_dump(TEMPLATES["rayjob-gpu"]))
    template["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, "1.37", strict=True)


def test_all_files_describe_the_same_cluster_and_job() -> None:
    (cluster,), (rayjob,), (cronjob) = load("raycluster"), load("rayjob"), load("raycronjob")
    assert _cluster(cluster) == _cluster(rayjob)
    assert cronjob[0]["spec"]["jobTemplate"] == rayjob["spec"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_pod_is_unprivileged_bounded_and_covered_by_the_network_policy(name: str) -> None:
    template, (account, policy) = TEMPLATES[name], load("common")
    assert template["metadata"]["labels"].items() >= PART_OF.items()
    assert policy["spec"]["podSelector"]["matchLabels"] == PART_OF
    spec = template["spec"]
    assert spec["restartPolicy"] == "Never"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    if name.endswith("-head"):
        assert spec["serviceAccountName"] == account["metadata"]["name"]
    else:
        assert spec["automountServiceAccountToken"] is False
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"]


def test_groups_scale_from_zero_and_only_one_group_asks_for_gpus(rayjob: Node) -> None:
    cluster, groups = _cluster(rayjob), _groups(rayjob)
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["autoscalerOptions"]["securityContext"]["allowPrivilegeEscalation"] is False
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    for name in ("cpu", "gpu"):
        assert groups[name]["replicas"] == groups[name]["minReplicas"] == 0 < groups[name]["maxReplicas"]
    gpus = {
        name: _container(group)["resources"]["limits"].get("nvidia.com/gpu") for name, group in groups.items()
    }
    assert gpus == {"head": None, "cpu": None, "gpu": "1"}


def test_every_node_has_probes_storage_credentials_and_a_bounded_shared_memory(rayjob: Node) -> None:
    for group in _groups(rayjob).values():
        container = _container(group)
        for probe in ("readinessProbe", "livenessProbe"):
            # Ray's agent serves this path without a token.
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["batchcls-storage"]
        (volume,) = group["template"]["spec"]["volumes"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert volume["emptyDir"]["medium"] == "Memory"
        # It counts as the container's memory; less than half leaves memory for the processes.
        assert (
            _bytes(volume["emptyDir"]["sizeLimit"]) < _bytes(container["resources"]["limits"]["memory"]) / 2
        )


def test_images_are_the_targets_of_the_dockerfile(rayjob: Node) -> None:
    dockerfile = (REPOSITORY / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    images = {name: _container(group)["image"] for name, group in _groups(rayjob).items()}
    images["submit"] = TEMPLATES["cronjob-submit"]["spec"]["containers"][0]["image"]
    base = images["head"].removesuffix("-cpu")
    assert images == {
        "head": f"{base}-cpu",
        "cpu": f"{base}-cpu",
        "gpu": f"{base}-cuda",
        "submit": f"{base}-cpu",
    }
    assert set(re.findall(rf"--target (\w+) .*-t {re.escape(base)}-(\w+)", dockerfile)) == {
        ("cpu", "cpu"),
        ("cuda", "cuda"),
    }


def test_a_run_that_needs_a_person_is_not_run_again(rayjob: Node) -> None:
    # KubeRay does not see the exit code, so it must not retry at all; Kubernetes sees it.
    assert rayjob["spec"]["backoffLimit"] == 0
    job = load("cronjob")[0]["spec"]["jobTemplate"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    final = {int(code) for code in ExitCode if code != ExitCode.DONE and not code.is_transient}
    assert set(rule["onExitCodes"]["values"]) == final
    assert job["backoffLimit"] > 0


def test_commands_name_a_job_and_a_configuration_of_this_repository(rayjob: Node) -> None:
    python, option, module, flag, config, *_ = rayjob["spec"]["entrypoint"].split()
    assert (python, option, flag) == ("python", "-m", "--config")
    assert importlib.util.find_spec(module) is not None
    assert (REPOSITORY / config).is_file()
    script, name, flag, config, *_ = TEMPLATES["cronjob-submit"]["spec"]["containers"][0]["command"]
    assert (module, flag) == (f"batchcls.jobs.{name}", "--config")
    assert (REPOSITORY / script).is_file()
    assert (REPOSITORY / config).is_file()


def test_the_token_comes_from_one_secret(rayjob: Node) -> None:
    secret = _cluster(rayjob)["authOptions"]["secretName"]
    assert _cluster(rayjob)["authOptions"] == {"mode": "token", "secretName": secret}
    environment = {
        variable["name"]: variable for variable in TEMPLATES["cronjob-submit"]["spec"]["containers"][0]["env"]
    }
    assert environment["RAY_AUTH_MODE"]["value"] == "token"
    # `auth_token` is the key that KubeRay reads.
    key = {"name": secret, "key": "auth_token"}
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == key
    assert f"secret generic {secret} --from-literal=auth_token=" in (FOLDER / "common.yaml").read_text(
        "utf-8"
    )
    assert all(resource["kind"] != "Secret" for file in FOLDER.glob("*.yaml") for resource in load(file.stem))


def test_ray_version_is_that_of_the_image(rayjob: Node) -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={_cluster(rayjob)['rayVersion']}\n" in constraints
