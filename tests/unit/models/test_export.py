"""Exported programs reproduce the bundle's outputs in the runtime of their format."""

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
    bundle = with_golden(resolve_model("timm:test_resnet", choices, Storage()))
    folder = tmp_path_factory.mktemp("bundle")
    bundle.save(str(folder), Storage())
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_program_matches_the_engine_for_any_batch_size(folder, kind, tmp_path):
    arguments = ["export", str(folder), "--output", str(tmp_path), "--format", kind]
    assert run("bundle", bundle_job.COMMANDS, arguments) == 0
    bundle = Bundle.load(str(folder), Storage())
    program = load_program((tmp_path / FILE_NAMES[kind]).read_bytes(), kind)
    engine = TorchEager(build_backbone(bundle), bundle.config.preprocessing, "cpu", "fp32", 1)
    for size in (1, 2, 5):
        pixels = np.random.default_rng(size).integers(0, 256, (size, 64, 64, 3), np.uint8)
        expected, found = engine.predict(pixels), program(pixels)
        assert np.allclose(found.logits, expected.logits, atol=1e-4)
        assert np.allclose(found.embedding, expected.embedding, atol=1e-4)


def test_program_is_described_by_model_json(folder, tmp_path):
    arguments = ["export", str(folder), "--output", str(tmp_path), "--format", "torch-export"]
    assert run("bundle", bundle_job.COMMANDS, arguments) == 0
    described = json.loads((tmp_path / "model.json").read_text())
    bundle = Bundle.load(str(folder), Storage())
    assert described["input"]["shape"] == ["batch", 64, 64, 3]
    assert described["outputs"]["embedding"]["shape"] == ["batch", bundle.config.embedding_dimension]
    assert described["bundle_fingerprint"] == bundle.fingerprint
    assert (tmp_path / "labels.txt").read_text().splitlines() == list(bundle.config.labels)


def test_program_with_other_outputs_is_rejected(folder):
    bundle = Bundle.load(str(folder), Storage())
    other = bundle.config.preprocessing.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    program = load_program(export_program(build_backbone(bundle), other, "torch-export"), "torch-export")
    with pytest.raises(GoldenMismatch):
        check_program(bundle.config, program)
