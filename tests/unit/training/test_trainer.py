"""The training loop with one process and with two gloo workers: equal gradients, every row once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.training.augmentation import AugmentedImages, Mixing, TrainingSample, crop_size, image_transform
from batchcls.training.loss import Divergence
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.recipe import read_recipe
from batchcls.training.sampling import LabeledRows, micro_batches, worker_share
from batchcls.training.train_config import DistributedContext
from batchcls.training.trainer import Training
from tests.helpers.training import (
    CLASSES,
    PREPROCESSING,
    ROWS,
    VALIDATION_ROWS,
    hooks,
    network,
    recipe,
    settings,
    train,
    weights_of,
    write_stores,
)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[PixelStore, PixelStore]:
    return write_stores(tmp_path)


def test_result_depends_on_the_seed(stores):
    first, second = (train(settings(), stores)[0] for _ in range(2))
    assert torch.equal(weights_of(first), weights_of(second))
    other, _, _ = train(settings(seed=4), stores)
    assert not torch.equal(weights_of(first), weights_of(other))


def test_head_is_trained_first(stores):
    before = network().state_dict()
    training, _, states = train(settings(recipe=recipe(ema_decay=None)), stores)
    after_head = states[0]["model"]
    changed = {name for name, value in before.items() if not torch.equal(value, after_head[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert not torch.equal(before["conv1.0.weight"], training.trained.state_dict()["conv1.0.weight"])
    # frozen statistics stay, to the last bit
    assert torch.equal(before["bn1.running_mean"], training.trained.state_dict()["bn1.running_mean"])


def test_micro_batches_accumulate_to_the_same_step(stores):
    whole, _, _ = train(settings(), stores)
    parts, _, _ = train(settings(micro_batch_size=3), stores)
    assert torch.allclose(weights_of(whole), weights_of(parts), atol=2e-4)
    assert parts.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-3)


def test_checkpoint_resumes_to_the_same_result(stores):
    undisturbed, _, states = train(settings(), stores)
    resumed = Training(network(), ["fc"], settings(), DistributedContext(), hooks())
    resumed.restore(states[1])
    assert resumed.run(*stores) is None
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert [record["epoch"] for record in resumed.history] == [1, 2, 3]


def test_checkpoint_with_other_parameter_groups_is_rejected(stores):
    _, _, states = train(settings(recipe=recipe(epochs=1, head_epochs=0, layer_decay=1.0)), stores)
    other = Training(network(), ["fc"], settings(), DistributedContext(), hooks())
    with pytest.raises(InputError, match=r"checkpoint of epoch 1 is not compatible .*pass --restart"):
        other.restore(states[0])


def test_every_validation_row_is_counted_once_and_unknown_categories_as_wrong(stores):
    training, _, _ = train(settings(), stores)
    assert {record["validation_rows"] for record in training.history} == {VALIDATION_ROWS}
    assert {record["validation_top5"] for record in training.history} == {1.0}
    targets = np.full(VALIDATION_ROWS, -2, np.int32)
    unknown = settings(validation=LabeledRows(np.arange(VALIDATION_ROWS), targets))
    training, _, _ = train(unknown, stores)
    assert training.history[-1]["validation_top1"] == 0


def test_non_finite_loss_ends_training_and_names_the_rows(stores, tmp_path: Path):
    broken = network()
    with torch.no_grad():
        broken.fc.bias[1] = float("nan")
    training, found, _ = train(settings(), stores, model=broken)
    assert isinstance(found, Divergence)
    assert (found.epoch, found.step, found.loss_is_finite) == (1, 1, False)
    assert len(found.rows) == 9
    assert training.history == []


@pytest.mark.parametrize("balance", ["sampling", "loss"])
def test_class_balance_options_train(stores, balance: str):
    targets = np.zeros(ROWS, np.int32)
    targets[:2] = 1
    uneven = settings(training=LabeledRows(np.arange(ROWS), targets), balance=balance)
    training, found, _ = train(uneven, stores)
    assert found is None
    assert np.isfinite(training.history[-1]["loss"])


def test_modern_and_classic_recipes_train(stores):
    for name in ("modern", "classic"):
        chosen = read_recipe(name).with_changes(epochs=1, batch_size=13)
        training, found, _ = train(settings(recipe=chosen), stores)
        assert found is None
        assert len(training.history) == 1


def test_augmentation_depends_only_on_seed_epoch_and_row(stores):
    transform = image_transform(read_recipe("modern"), (32, 32), PREPROCESSING)
    images = AugmentedImages(stores[0], transform, (3, 0))
    torch.manual_seed(1)
    first = images[TrainingSample(4, 1)][0]
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    images[TrainingSample(9, 0)]
    assert torch.equal(first, images[TrainingSample(4, 1)][0])
    other_epoch = AugmentedImages(stores[0], transform, (3, 1))
    assert not torch.equal(first, other_epoch[TrainingSample(4, 1)][0])


def test_augmentation_does_not_seed_gpus(stores, monkeypatch: pytest.MonkeyPatch):
    """Seeding GPUs for each image would change dropout."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    transform = image_transform(read_recipe("modern"), (32, 32), PREPROCESSING)
    images = AugmentedImages(stores[0], transform, (3, 0))
    assert not torch.equal(images[TrainingSample(4, 1)][0], images[TrainingSample(7, 1)][0])
    Mixing(read_recipe("modern"), CLASSES)(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), 1)
    assert seeded == []


def test_mixing_converts_indices_to_probabilities():
    mixed, shares = Mixing(read_recipe("modern"), CLASSES)(
        torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), 1, 2
    )
    assert mixed.shape == (4, 3, 32, 32)
    assert torch.allclose(shares.sum(1), torch.ones(4))
    images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    assert Mixing(read_recipe("classic"), CLASSES)(images, targets, 1) == (images, targets)


def test_metrics_of_mixed_images_use_the_mixed_targets(stores, monkeypatch: pytest.MonkeyPatch):
    """Mixing that keeps the images and only changes the label equals training with the changed labels."""
    targets = ((np.arange(ROWS) + 1) % CLASSES).astype(np.int32)
    expected, _, _ = train(settings(training=LabeledRows(np.arange(ROWS), targets)), stores)

    def renamed(_, images: torch.Tensor, found: torch.Tensor, *seed: int):
        return images, nn.functional.one_hot((found + 1) % CLASSES, CLASSES).float()

    monkeypatch.setattr(Mixing, "__call__", renamed)
    mixed, _, _ = train(settings(), stores)
    for ours, theirs in zip(mixed.history, expected.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["top1"] == theirs["top1"]


def test_final_crops_are_larger_and_multiples_of_32():
    big = PREPROCESSING.model_copy(
        update={"input_height": 224, "input_width": 224, "resize_height": 256, "resize_width": 256}
    )
    chosen = read_recipe("fine-tune").with_changes(size_fraction=0.7, final_size_fraction=1.0)
    sizes = [crop_size(chosen, epoch, big) for epoch in (0, chosen.epochs - 1)]
    assert sizes == [(160, 160), (224, 224)]


def test_worker_shares_partition_a_step():
    step = np.arange(11)
    assert sorted(np.concatenate([worker_share(step, rank, 3) for rank in range(3)])) == list(range(11))
    assert [len(part) for part in micro_batches(step, 4)] == [4, 4, 3]
    assert [len(part) for part in micro_batches(step, None)] == [11]


@pytest.mark.parametrize("balance", ["none", "sampling"])
def test_repeated_rows_are_augmented_differently(stores, balance: str):
    """Augmentation depends on seed, epoch, row and occurrence, and not on the number of workers and micro-batches."""
    targets = np.zeros(ROWS, np.int32)
    targets[:2] = 1
    chosen = settings(training=LabeledRows(np.arange(ROWS), targets), balance=balance)

    def augmented(context: DistributedContext, micro_batch_size: int | None) -> list[tuple[int, bytes]]:
        training = Training(
            network(), ["fc"], replace(chosen, micro_batch_size=micro_batch_size), context, hooks()
        )
        return [
            (row, image.numpy().tobytes())
            for step in training._steps(1, stores[0], 0)
            for images, _, rows in step.batches
            for row, image in zip(rows.tolist(), images, strict=True)
        ]

    alone = augmented(DistributedContext(), None)
    assert len(set(alone)) == len(alone) == ROWS
    assert (Counter(row for row, _ in alone).most_common(1)[0][1] > 4) == (balance == "sampling")
    shared = [augmented(DistributedContext(rank, 3), 2) for rank in range(3)]
    assert sorted(part for rank in shared for part in rank) == sorted(alone)


def test_mixing_recipes_reject_micro_batches_of_one_image(stores):
    with pytest.raises(InputError, match=r"each micro-batch has a single image; increase --micro-batch-size"):
        train(settings(recipe=recipe(mixup=0.2), micro_batch_size=1), stores)


def test_head_epochs_train_only_trainable_parameters(stores):
    with pytest.raises(InputError, match=r"only the classifier \(fc\).*\(layer4\.\*\) exclude it"):
        train(settings(trainable=("layer4.*",)), stores)
    training, _, states = train(settings(trainable=("layer4.*", "fc.bias")), stores)
    assert torch.equal(states[0]["model"]["fc.weight"], network().state_dict()["fc.weight"])
    assert not torch.equal(states[0]["model"]["fc.bias"], network().state_dict()["fc.bias"])
    assert training.history[-1]["epoch"] == 3
