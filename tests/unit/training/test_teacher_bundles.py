"""Teachers are checked before PyTorch and a cluster are started, and they belong to the settings of a run."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.jobs.input_check import check_finetune
from batchcls.models.model_bundle import Bundle
from batchcls.storage.filesystem import Storage
from batchcls.training.teacher_bundles import open_teachers
from tests.conftest import REPOSITORY
from tests.helpers.training import LABELS, teacher


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """A manifest with the categories cap, bag and mug, whose images do not exist."""
    path = tmp_path / "train.parquet"
    labels = ["cap", "bag", "mug", "bag"]
    columns = {"item_id": list("abcd"), "uri": [f"{name}.png" for name in "abcd"], "label": labels}
    pq.write_table(pa.table(columns), path)
    return str(path)


def saved(folder: Path, *labels: str, **changes: object) -> str:
    bundle = teacher(labels=(*LABELS, *labels)).bundle
    if changes:
        bundle = bundle.with_weights(bundle.weights, **changes)
    bundle.save(str(folder), Storage())
    return str(folder)


def config(manifest: str, *teachers: str, **changes: object) -> FinetuneConfig:
    values = {"manifest": manifest, "validation": manifest, "output": "o", "model": "timm:test_resnet"}
    return FinetuneConfig(**(values | {"teacher": list(teachers)} | changes))


def without(folder: Path, label: str) -> str:
    """A teacher that has another category instead of `label`."""
    bundle = teacher().bundle
    labels = tuple("other" if name == label else name for name in LABELS)
    bundle.with_weights(bundle.weights, labels=labels).save(str(folder), Storage())
    return str(folder)


def test_classes_of_the_teacher_are_in_the_order_of_the_student(tmp_path: Path):
    uris = [saved(tmp_path / "one"), saved(tmp_path / "two", "scarf")]
    first, second = open_teachers(uris, ("mug", "bag", "cap"), Storage())
    assert first.classes == second.classes == (2, 0, 1)
    assert (
        first.bundle.fingerprint == Bundle.load(uris[0], Storage()).fingerprint != second.bundle.fingerprint
    )
    assert second.lineage()["fingerprint"] == second.bundle.fingerprint


def test_teacher_without_a_category_is_rejected_and_the_category_named(tmp_path: Path, manifest: str):
    complete, lacking = saved(tmp_path / "complete"), without(tmp_path / "lacking", "cap")
    check_finetune(config(manifest, complete))
    message = rf"--teacher {lacking} lacks 1 of the 3 categories of the student: cap; fine-tune the teacher"
    for found in (check_finetune, lambda chosen: open_teachers(chosen.teacher, LABELS, Storage())):
        with pytest.raises(InputError, match=message):
            found(config(manifest, complete, lacking))


def test_categories_of_the_student_are_those_of_its_bundle_and_of_labels(tmp_path: Path, manifest: str):
    """The categories of the initial bundle are kept, and --labels may name more than the manifest has."""
    complete, larger = saved(tmp_path / "complete"), saved(tmp_path / "larger", "scarf")
    with pytest.raises(InputError, match=r"lacks 1 of the 4 categories of the student: scarf"):
        check_finetune(config(manifest, complete, model=larger))
    check_finetune(config(manifest, larger, model=complete))
    (tmp_path / "labels.txt").write_text("bag\ncap\nmug\nwatch\n")
    with pytest.raises(InputError, match=r"lacks 1 of the 4 categories of the student: watch"):
        check_finetune(config(manifest, larger, labels=str(tmp_path / "labels.txt")))


def test_missing_and_untrained_teachers_are_rejected(tmp_path: Path, manifest: str):
    with pytest.raises(InputError, match=r"--teacher .*/absent: there is no bundle, .* `batchcls finetune`"):
        check_finetune(config(manifest, str(tmp_path / "absent")))
    for name, changes in (("new", {"untrained_head": True}), ("random", {"origin": {"kind": "random"}})):
        with pytest.raises(InputError, match=r"this bundle is not trained; train it"):
            check_finetune(config(manifest, saved(tmp_path / name, **changes)))


def test_teacher_given_twice_is_rejected(tmp_path: Path):
    with pytest.raises(ValidationError, match=r"--teacher contains a bundle twice"):
        config("m", f"{tmp_path}/a", f"{tmp_path}/b/../a")


_COMMAND = """
import sys
from batchcls.cli.app import run
from batchcls.jobs import finetune
code = run("finetune", finetune.COMMANDS, sys.argv[1:])
loaded = {"ray", "torch"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else code)
"""


def test_command_rejects_a_teacher_before_ray_and_torch_are_imported(tmp_path: Path, manifest: str):
    arguments = ("--manifest", manifest, "--validation", manifest, "--model", "timm:test_resnet")
    teachers = f"{saved(tmp_path / 'complete')},{without(tmp_path / 'lacking', 'mug')}"
    result = subprocess.run(
        [
            *(sys.executable, "-c", _COMMAND, *arguments),
            *("--output", str(tmp_path / "out"), "--teacher", teachers),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "of the student: mug" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()
