"""Errors that need no cluster are reported before connecting to one; no server responds at the given address."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.jobs import classify, compare
from batchcls.storage.filesystem import Storage
from tests.conftest import REPOSITORY
from tests.helpers.training import teacher

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


_REJECTED = """
import sys
from importlib import import_module
from batchcls.cli.app import run
name = sys.argv[1]
job = import_module(f"batchcls.jobs.{name}")
for arguments in sys.stdin.read().splitlines():
    print("exit code", run(name, job.COMMANDS, arguments.split("|")), file=sys.stderr)
    if {"ray", "torch"} & set(sys.modules):
        sys.exit("Ray or PyTorch has been imported")
"""


def _check_rejected(job: str, given: dict[str, str], wrong: list[tuple[str, str, str]]) -> None:
    """Run commands with one wrong value each, (flag, value, part of the message), before Ray and PyTorch."""
    commands = ["|".join(sum((given | {flag: value}).items(), ())) for flag, value, _ in wrong]
    done = subprocess.run(
        [sys.executable, "-c", _REJECTED, job],
        input="\n".join(commands),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["exit code 2"] * len(wrong), done.stderr
    for line, (flag, value, message) in zip(lines[::2], wrong, strict=True):
        assert message in line, (flag, value, line)


def test_finetune_reports_errors_before_ray_and_torch_are_imported(manifest: str, tmp_path: Path):
    given = {
        "--manifest": manifest, "--validation": manifest, "--model": "resnet50", "--output": f"{tmp_path}/out",
        "--ray-address": UNREACHABLE,
    }  # fmt: skip
    wrong = [
        ("--model", "resnet51", "did you mean resnet50"),
        ("--model", "./no/bundle", "no/bundle does not exist"),
        ("--model-args", "drop", "key=value"),
        ("--weights", "nowhere.st", "nowhere.st: there is no such file"),
        ("--labels", "nowhere.txt", "nowhere.txt: there is no such file"),
        ("--recipe", "best", "--recipe best: there is no such recipe"),
        ("--manifest", "nowhere.parquet", "nowhere.parquet does not exist"),
        ("--validation", "nothing.parquet", "nothing.parquet does not exist"),
        ("--label-column", "color", "--label-column color is missing"),
        ("--id-column", "sku", "column sku is missing"),
    ]
    _check_rejected("finetune", given, wrong)
    assert not list(tmp_path.glob("out*"))


def test_evaluate_reports_errors_before_ray_and_torch_are_imported(manifest: str, tmp_path: Path):
    bundle = teacher().bundle
    bundle.save(f"{tmp_path}/bundle", Storage())
    given = {"--manifest": manifest, "--model": f"{tmp_path}/bundle", "--output": f"{tmp_path}/out"}
    wrong = [
        ("--model", "./no/bundle", "no/bundle does not exist"),
        ("--run", "out/runs/1", "either --model BUNDLE or --run"),
        ("--manifest", "nowhere.parquet", "nowhere.parquet does not exist"),
        ("--label-column", "color", "--label-column color is missing"),
        ("--id-column", "sku", "column sku is missing"),
    ]
    _check_rejected("evaluate", given, wrong)
    assert not list(tmp_path.glob("out*"))


def test_compare_reports_errors_before_ray_and_torch_are_imported(manifest: str, tmp_path: Path):
    given = {"--manifest": manifest, "--models": "resnet50", "--output": f"{tmp_path}/out"}
    wrong = [
        ("--models", "resnet50,resnet51", "did you mean resnet50"),
        ("--models", "./no/bundle", "no/bundle does not exist"),
        ("--engines", "tensorflow:fp32", "tensorflow"),
        ("--manifest", "nowhere.parquet", "nowhere.parquet does not exist"),
        ("--label-column", "color", "--label-column color is missing"),
        ("--id-column", "sku", "column sku is missing"),
    ]
    _check_rejected("compare", given, wrong)
    assert not list(tmp_path.glob("out*"))
