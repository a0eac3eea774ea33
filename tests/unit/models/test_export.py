"""Exported programs give the bundle's answers, in the runtime they are made for."""

import json
from pathlib import Path

import numpy as np
import pytest

from batchcls.cli.app import run
from batchcls.errors import GoldenMismatch
from batchcls.inference.golden_record import check_program, with_golden
from batchcls.jobs import bundle as bundle_job
from batchcls.models.build import build_backbone
from batchcls.models.engines.torch_eager import TorchEager
from batchcls.models.export import FILE_NAMES, export_program, load_program
from batchcls.models.model_bundle import Bundle
from batchcls.models.model_spec import ModelChoices, PreprocessingOverrides
from batchcls.models.resolve import resolve_model
from batchcls.storage.filesystem import Storage

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ["onnx", "torch-export"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    choices = ModelChoices(allow_random=True, overrides=PreprocessingOverrides(input_size=64), tap="stage2")
    made = with_golden(resolve_model("timm:test_resnet", choices, Storage()))
    folder = tmp_path_factory.mktemp("bundle")
    made.save(str(folder), Storage())
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_the_program_answers_as_the_engine_does_for_any_batch(folder, kind, tmp_path):
    arguments = ["export", str(folder), "--output", str(tmp_path), "--format", kind]
    assert run("bundle", bundle_job.COMMANDS, arguments) == 0
    made = Bundle.load(str(folder), Storage())
    program = load_program((tmp_path / FILE_NAMES[kind]).read_bytes(), kind)
    engine = TorchEager(build_backbone(made), made.config.preprocessing, "cpu", "fp32", 1)
    for size in (1, 2, 5):
        pixels = np.random.default_rng(size).integers(0, 256, (size, 64, 64, 3), np.uint8)
        expected, found = engine.predict(pixels), program(pixels)
        assert np.allclose(found.logits, expected.logits, atol=1e-4)
        assert np.allclose(found.embedding, expected.embedding, atol=1e-4)


def test_what_a_caller_must_know_stands_beside_the_program(folder, tmp_path):
    arguments = ["export", str(folder), "--output", str(tmp_path), "--format", "torch-export"]
    assert run("bundle", bundle_job.COMMANDS, arguments) == 0
    described = json.loads((tmp_path / "model.json").read_text())
    made = Bundle.load(str(folder), Storage())
    assert described["input"]["shape"] == ["batch", 64, 64, 3]
    assert described["outputs"]["embedding"]["shape"] == ["batch", made.config.embedding_dimension]
    assert described["bundle_fingerprint"] == made.fingerprint
    assert (tmp_path / "labels.txt").read_text().splitlines() == list(made.config.labels)


def test_a_program_that_answers_otherwise_is_not_written(folder):
    made = Bundle.load(str(folder), Storage())
    other = made.config.preprocessing.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    program = load_program(export_program(build_backbone(made), other, "torch-export"), "torch-export")
    with pytest.raises(GoldenMismatch):
        check_program(made.config, program)
