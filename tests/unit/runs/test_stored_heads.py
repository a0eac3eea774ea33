"""Classifiers in the output folder."""

from pathlib import Path

import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.models.classifier_head import ClassifierHead, ModelLayers
from batchcls.runs.plan import create_plan
from batchcls.runs.stored_heads import load, remove_unused, save, uri_of
from batchcls.storage.filesystem import Storage
from tests.helpers.runs import RunDetails, plan_of

STORAGE = Storage()


def _head(seed: int) -> ClassifierHead:
    random = np.random.default_rng(seed)
    return ClassifierHead(random.random((3, 4), np.float32), random.random(3, np.float32))


def _start(output: Path, run_id: str, head: ClassifierHead) -> None:
    layers = ModelLayers(
        preprocessing="p",
        trunk="t",
        head=head.digest,
        labels="l",
        category_paths="c",
        temperature=1.0,
        thresholds="",
    )
    plan = plan_of(RunDetails(run_id), 1)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"layers": layers})})
    create_plan(plan, str(output), STORAGE)


def test_classifier_is_stored_once_and_read_back(tmp_path: Path):
    head = _head(0)
    save(str(tmp_path), head, STORAGE)
    path = Path(uri_of(str(tmp_path), head.digest))
    before = path.stat().st_mtime_ns
    save(str(tmp_path), head, STORAGE)
    assert path.stat().st_mtime_ns == before
    assert load(str(tmp_path), head.digest, STORAGE).digest == head.digest


def test_missing_and_damaged_classifiers_are_rejected(tmp_path: Path):
    head = _head(0)
    with pytest.raises(InputError, match=r"heads/"):
        load(str(tmp_path), head.digest, STORAGE)
    Path(uri_of(str(tmp_path), head.digest)).parent.mkdir()
    Path(uri_of(str(tmp_path), head.digest)).write_bytes(_head(1).to_safetensors())
    with pytest.raises(InputError, match="damaged"):
        load(str(tmp_path), head.digest, STORAGE)


def test_classifiers_of_removed_runs_are_removed(tmp_path: Path):
    used, unused = _head(0), _head(1)
    for head in (used, unused):
        save(str(tmp_path), head, STORAGE)
    _start(tmp_path, "n1", used)
    assert remove_unused(str(tmp_path), STORAGE) == len(unused.to_safetensors())
    assert [path.stem for path in (tmp_path / "heads").iterdir()] == [used.digest]


def test_nothing_is_removed_if_a_run_cannot_be_read(tmp_path: Path, log: pytest.LogCaptureFixture):
    save(str(tmp_path), _head(0), STORAGE)
    _start(tmp_path, "n1", _head(1))
    (tmp_path / "runs" / "n1" / "plan.json").write_text("{")
    assert remove_unused(str(tmp_path), STORAGE) == 0
    assert len(list((tmp_path / "heads").iterdir())) == 1
    assert "no classifier is removed" in log.text
