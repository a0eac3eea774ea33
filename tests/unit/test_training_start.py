"""What training starts from: the categories' own classifier on a trained body."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from batchcls.config.finetune import FinetuneConfig
from batchcls.errors import InputError
from batchcls.models.build import build_model
from batchcls.models.bundle import Bundle
from batchcls.storage import Storage
from batchcls.training.bundle_out import Trained, trained_bundle
from batchcls.training.start import open_start, start_for

LABELS = ("bag", "cap", "mug")


def config(model: str, **changes: object) -> FinetuneConfig:
    known = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "input_size": 64, "crop_pct": 0.9}
    chosen = (known if model.startswith("timm:") else {}) | changes
    return FinetuneConfig(manifest="m", validation="v", output="o", model=model, **chosen)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return str(path)


def start(chosen: FinetuneConfig, labels: tuple[str, ...] = LABELS) -> Bundle:
    return start_for(chosen, open_start(chosen, Storage()), labels, Storage())


def test_named_weights_get_a_classifier_to_which_all_categories_are_alike(weights: str):
    made = start(config("timm:test_resnet", weights=weights))
    assert made.config.labels == LABELS
    assert made.config.untrained_head
    assert not made.publishable
    model = build_model(made).eval()
    assert not model.fc.weight.any()
    assert torch.equal(model(torch.randn(2, 3, 64, 64)), torch.zeros(2, 3))
    trained = timm.create_model("test_resnet", num_classes=7)
    trained.load_state_dict(load_file(weights))
    assert torch.equal(model.conv1[0].weight, trained.conv1[0].weight)


def test_a_bundle_keeps_its_classifier_where_its_categories_are_these(weights: str, tmp_path: Path):
    made = start(config("timm:test_resnet", weights=weights))
    state = build_model(made).state_dict()
    moved = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    trained = trained_bundle(made, Trained(moved, ()), "run-1", {"digest": "x"})
    assert trained.publishable
    assert trained.config.golden is not None
    assert trained.config.preprocessing == made.config.preprocessing
    assert trained.config.lineage["start"]["weights"]["kind"] == "file"
    folder = str(tmp_path / "bundle")
    trained.save(folder, Storage())
    again = start(config(folder))
    assert again.fingerprint == trained.fingerprint
    other = start(config(folder), ("bag", "cap"))
    assert other.config.labels == ("bag", "cap")
    assert not build_model(other).fc.weight.any()
    assert torch.equal(build_model(other).conv1[0].weight, build_model(trained).conv1[0].weight)


def test_from_scratch_keeps_the_initial_values_of_the_library():
    made = start(config("timm:test_resnet", from_scratch=True))
    assert made.config.weights.kind == "random"
    assert build_model(made).fc.weight.any()


def test_what_a_bundle_brings_itself_cannot_be_said_about_it(weights: str, tmp_path: Path):
    folder = str(tmp_path / "bundle")
    start(config("timm:test_resnet", weights=weights)).save(folder, Storage())
    with pytest.raises(InputError, match="--from-scratch: --model is a bundle"):
        open_start(config(folder, from_scratch=True), Storage())
    with pytest.raises(InputError, match="--model is a bundle, which brings its own"):
        open_start(config(folder, input_size=96), Storage())
