"""Errors that need no cluster are reported before connecting to one; no server responds at the given address."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.jobs import classify, compare

UNREACHABLE = "127.0.0.1:1"


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    path = tmp_path / "catalog.parquet"
    pq.write_table(pa.table({"item_id": ["a"], "uri": ["a.jpg"], "label": ["x"]}), path)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "resnet51"], ["resnet51", "did you mean resnet50"]),
        (["--model", "timm:mobilenetv2_99"], ["did you mean", "timm:mobilenetv2_100"]),
        (["--model", "resnet51.tag"], ["did you mean resnet50"]),
        (["--model", "./no/bundle"], ["no/bundle does not exist", "bundle create"]),
        (["--model", "s3:/typo"], ["s3://typo", "too few slashes"]),
        (
            ["--model", "resnet50", "--weights", "nowhere.st"],
            ["--weights", "nowhere.st: there is no such file"],
        ),
        (
            ["--model", "resnet50", "--labels", "nowhere.txt"],
            ["--labels", "nowhere.txt: there is no such file"],
        ),
        (["--model", "resnet50", "--id-column", "sku"], ["column sku is missing", "--id-column"]),
        (["--model", "resnet50", "--keep", "price"], ["column price is missing"]),
        (["--model", "resnet50", "--manifest", "nowhere.parquet"], ["nowhere.parquet does not exist"]),
        (["--model", "resnet50", "--abstain"], ["--abstain", "evaluate"]),
        (["--model", "resnet50", "--model-args", "drop"], ["--model-args", "key=value"]),
    ],
)
def test_classify_reports_errors_before_connecting_to_a_cluster(
    manifest: str, tmp_path: Path, capsys, arguments: list[str], words: list[str]
):
    given = ["--manifest", manifest, "--output", str(tmp_path / "out"), "--ray-address", UNREACHABLE]
    assert run("classify", classify.COMMANDS, [*given, *arguments]) == 2
    output = capsys.readouterr().err
    assert "--ray-address" not in output
    for word in words:
        assert word in output
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_reported_before_connecting(manifest: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    given = ["--manifest", manifest, "--output", str(tmp_path / "out"), "--ray-address", UNREACHABLE]
    for more in (["--engine", "openvino"], ["--precision", "int8"]):
        assert run("classify", classify.COMMANDS, [*given, "--model", str(tmp_path), *more]) == 2
        assert "pip install 'batchcls[openvino]'" in capsys.readouterr().err


def test_compare_checks_all_names_before_sampling(manifest: str, tmp_path: Path, capsys):
    given = ["--manifest", manifest, "--output", str(tmp_path / "out"), "--ray-address", UNREACHABLE]
    assert run("compare", compare.COMMANDS, [*given, "--models", "resnet50,resnet51"]) == 2
    output = capsys.readouterr().err
    assert "did you mean resnet50" in output
    assert "sample" not in output
