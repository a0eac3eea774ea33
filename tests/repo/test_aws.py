"""Validates cluster/aws.yaml by Ray's own validator, and its instances against botocore's model of EC2."""

import copy
from collections.abc import Callable
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.conftest import REPOSITORY

Node = dict[str, Any]


@pytest.fixture
def config() -> Node:
    loaded: Node = yaml.load((REPOSITORY / "cluster" / "aws.yaml").read_text("utf-8"), yaml.CSafeLoader)
    return copy.deepcopy(loaded)  # anchors are shared objects, which prepare_config changes


@pytest.fixture(scope="module")
def launch_errors() -> Callable[[Node], str]:
    """Return a function that checks the parameters of an EC2 instance without a request."""
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape

    def check(node_config: Node) -> str:
        report = ParamValidator().validate(node_config | {"MinCount": 1, "MaxCount": 1}, shape)
        return str(report.generate_report())

    return check


def test_ray_accepts_the_cluster(config: Node):
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert {name: (group["min_workers"], group["max_workers"]) for name, group in types.items()} == {
        "head": (0, 0),
        "cpu": (0, 8),
        "gpu": (0, 4),
    }
    # Ray's default would install another version of Ray over the image's.
    assert not any("ray" in command for command in prepared["head_setup_commands"])
    assert prepared["worker_setup_commands"] == []


def _misspell_a_group(config: Node) -> None:
    config["available_node_types"]["gpu"]["min_worker"] = 0


def _misspell_the_top(config: Node) -> None:
    config["max_worker"] = config.pop("max_workers")


def _fraction(config: Node) -> None:
    config["available_node_types"]["cpu"]["resources"]["CPU"] = 0.5


def _misspell_docker(config: Node) -> None:
    config["docker"]["images"] = "x"


@pytest.mark.parametrize("damage", [_misspell_a_group, _misspell_the_top, _fraction, _misspell_docker])
def test_ray_rejects_a_damaged_copy(config: Node, damage: Callable[[Node], None]):
    damage(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


def test_ec2_knows_every_parameter_of_the_instances(config: Node, launch_errors: Callable[[Node], str]):
    for group in config["available_node_types"].values():
        assert launch_errors(group["node_config"]) == ""
    config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOption"] = {"MarketType": "spot"}
    assert "InstanceMarketOption" in launch_errors(config["available_node_types"]["gpu"]["node_config"])


def test_workers_start_at_zero_gpus_are_spot_and_credentials_come_from_roles(config: Node):
    groups = config["available_node_types"]
    assert groups["head"]["resources"] == {"CPU": 0}
    assert groups["gpu"]["resources"]["GPU"] == 1
    assert groups["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for group in groups.values():
        assert group["node_config"]["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::")
        assert group["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    head, worker = (groups[name]["node_config"]["IamInstanceProfile"] for name in ("head", "cpu"))
    assert head != worker == groups["gpu"]["node_config"]["IamInstanceProfile"]
    text = (REPOSITORY / "cluster" / "aws.yaml").read_text("utf-8")
    assert "AWS_SECRET" not in text


def test_every_node_starts_with_the_mounted_token(config: Node):
    (folder,) = config["file_mounts"]
    home, _, name = folder.rpartition("/")
    assert home == "/home/batchcls"
    for role in ("head", "worker"):
        command = config[f"{role}_start_ray_commands"][-1]
        assert f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/{name}/auth_token" in command
