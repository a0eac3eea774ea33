"""Training rows that are held out select the epoch whose weights are kept, and may end training."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.images.transform import Transform
from batchcls.preprocessing import Preprocessing
from batchcls.training.pixel_cache import PixelStore, center, uncropped
from batchcls.training.sampling import LabeledRows
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.trained_bundle import TrainingResult, read_training_result
from batchcls.training.trainer import State, Training
from tests.helpers.training import CLASSES, ROWS, hooks, network, recipe, settings, train, write_stores

HELD_OUT = 6


@pytest.fixture
def stores(tmp_path: Path) -> tuple[PixelStore, PixelStore]:
    return write_stores(tmp_path)


def held_out(**changes: object) -> TrainingSettings:
    """Settings that hold out the last rows, with wrong categories, so that their loss rises with training."""
    plain = settings()
    rows, targets = plain.training.rows, plain.training.targets
    changes = {
        "training": LabeledRows(rows[:-HELD_OUT], targets[:-HELD_OUT]),
        "held_out": LabeledRows(rows[-HELD_OUT:], (targets[-HELD_OUT:] + 1) % CLASSES),
        "recipe": recipe(epochs=6, head_epochs=0, learning_rate=0.01, head_learning_rate=0.01),
        **changes,
    }
    return replace(plain, **changes)


def result_of(state: State) -> TrainingResult:
    file = io.BytesIO()
    torch.save(state, file)
    return read_training_result(file.getvalue())


def test_weights_of_the_epoch_with_the_lowest_held_out_loss_are_kept(stores):
    training, found, states = train(held_out(), stores)
    assert found is None
    losses = [record["held_out_loss"] for record in training.history]
    best = int(np.argmin(losses))
    assert best < len(losses) - 1, "the test needs an epoch that is better than the last one"
    result = result_of(states[-1])
    assert result.epoch == best + 1
    assert result.record == training.history[best]
    for name, value in states[best]["average"].items():
        assert torch.equal(result.weights[name], value)


def test_held_out_rows_are_evaluated_and_not_trained_on(stores):
    training, _, _ = train(held_out(), stores)
    assert {record["images"] for record in training.history} == {ROWS - HELD_OUT}
    assert {record["held_out_rows"] for record in training.history} == {HELD_OUT}
    other = held_out(held_out=LabeledRows(np.arange(CLASSES), np.arange(CLASSES, dtype=np.int32)))
    same, _, _ = train(other, stores)
    for ours, theirs in zip(training.history, same.history, strict=True):
        assert ours["loss"] == theirs["loss"]
        assert ours["held_out_loss"] != theirs["held_out_loss"]


def test_training_ends_after_epochs_without_improvement_and_stays_ended(stores):
    patient = held_out(patience=1)
    training, _, states = train(patient, stores)
    losses = [record["held_out_loss"] for record in training.history]
    assert len(losses) == int(np.argmin(losses)) + 2 < patient.recipe.epochs
    resumed = Training(network(), ["fc"], patient, DistributedContext(), hooks())
    resumed.restore(states[-1])
    assert resumed.run(*stores) is None
    assert resumed.history == training.history


def test_without_held_out_rows_the_last_weights_are_kept(stores):
    training, _, states = train(settings(), stores)
    result = result_of(states[-1])
    assert result.epoch is None
    assert result.record == training.history[-1]


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize(("height", "width"), [(61, 40), (40, 61), (50, 50)])
def test_center_of_prepared_pixels_is_the_image_of_classify(crop_mode: str, height: int, width: int):
    preprocessing = Preprocessing(
        input_height=32,
        input_width=24,
        resize_height=37,
        resize_width=29,
        crop_mode=crop_mode,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    prepared = Transform(uncropped(preprocessing))(image)
    assert np.array_equal(center(prepared, (32, 24)), Transform(preprocessing)(image))


def test_patience_without_held_out_rows_is_rejected():
    paths = {"manifest": "m.parquet", "validation": "v.parquet", "output": "out", "model": "resnet18"}
    with pytest.raises(ValueError, match="--patience has no effect without --held-out-fraction"):
        FinetuneConfig(**paths, patience=2)
