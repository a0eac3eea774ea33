"""Class weights in the loss: the weight applies to the row, not to the classes of label smoothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from batchcls.training.augmentation import Mixing
from batchcls.training.pixel_cache import PixelStore
from batchcls.training.sampling import LabeledRows, RowSampler, class_weights, epoch_steps
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.train_metrics import normalized
from batchcls.training.trainer import Training
from tests.helpers.training import CLASSES, Tiny, hooks, recipe, settings, train, write_stores

pytestmark = pytest.mark.usefixtures("one_thread")

COUNTS = (940, 10, 10)


def uneven(folder: Path, held_out: int = 60) -> tuple[TrainingSettings, tuple[PixelStore, PixelStore]]:
    """940, 10 and 10 training rows, and equally many validation rows per category."""
    targets = np.repeat(np.arange(CLASSES), COUNTS).astype(np.int32)
    others = (np.arange(held_out) % CLASSES).astype(np.int32)
    chosen = settings(
        training=LabeledRows(np.arange(len(targets)), targets),
        validation=LabeledRows(np.arange(held_out), others),
    )
    return chosen, write_stores(folder, targets, others)


def recalls(model: nn.Module, store: PixelStore, targets: np.ndarray) -> list[float]:
    images = torch.from_numpy(np.stack([store[row] for row in range(len(targets))])).permute(0, 3, 1, 2)
    half = torch.full((1, 3, 1, 1), 0.5)
    with torch.inference_mode():
        predictions = model.eval()(normalized(images, half, half)).argmax(1).numpy()
    return [float((predictions[targets == k] == k).mean()) for k in range(CLASSES)]


@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_rare_categories_are_learned_with_940_10_10_rows(tmp_path: Path, mixup: float):
    chosen, stores = uneven(tmp_path)
    how = recipe(
        epochs=4, head_epochs=0, learning_rate=0.02, head_learning_rate=0.02, batch_size=32, mixup=mixup,
        label_smoothing=0.1,
    )  # fmt: skip
    training, found, _ = train(replace(chosen, recipe=how, balance="loss"), stores, model=Tiny())
    assert found is None
    assert min(recalls(training.trained, stores[1], chosen.validation.targets)) > 0.9


@pytest.mark.parametrize(("micro_batch_size", "mixup"), [(None, 0.0), (4, 0.0), (None, 0.4)])
def test_weighted_training_equals_a_plain_loop(tmp_path: Path, micro_batch_size: int | None, mixup: float):
    """The loss of a step is the mean of the weighted losses of its rows, also over several micro-batches."""
    chosen, stores = uneven(tmp_path)
    some = np.r_[0:20, 940:944, 950:953]
    how = recipe(
        epochs=2, head_epochs=0, optimizer="sgd", batch_size=9, label_smoothing=0.1, mixup=mixup, layer_decay=1.0,
        learning_rate=0.1, head_learning_rate=0.1, weight_decay=0.0, schedule="steps", warmup_fraction=0.0,
        milestones=(), clip_norm=None, ema_decay=None, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0,
    )  # fmt: skip
    labeled = LabeledRows(some, chosen.training.targets[some])
    chosen = replace(chosen, recipe=how, balance="loss", training=labeled, micro_batch_size=micro_batch_size)
    training = Training(Tiny(), ["fc"], chosen, DistributedContext(), hooks())
    assert training.run(*stores) is None
    expected = plain_loop(chosen, stores[0])
    for name, value in training.trained.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-6)


def plain_loop(chosen: TrainingSettings, store: PixelStore) -> nn.Module:
    """Reference implementation of the training loop."""
    model, how, labeled = Tiny(), chosen.recipe, chosen.training
    solver = torch.optim.SGD(model.parameters(), lr=how.learning_rate, momentum=how.momentum, nesterov=True)
    weights = torch.from_numpy(class_weights(np.bincount(labeled.targets)))
    half, resize = torch.full((1, 3, 1, 1), 0.5), v2.Resize((32, 32), antialias=True)
    for epoch in range(how.epochs):
        steps = epoch_steps(RowSampler(labeled.targets, chosen.seed), epoch, how.batch_size)
        for number, step in enumerate(steps):
            images = torch.stack(
                [torch.from_numpy(store[row]).permute(2, 0, 1) for row in labeled.rows[step]]
            )
            pixels = normalized(resize(images), half, half)
            targets = torch.from_numpy(labeled.targets[step]).long()
            mixed, shares = Mixing(how, CLASSES)(pixels, targets, chosen.seed, epoch, number, 0, 0)
            if shares.dim() == 1:
                shares = nn.functional.one_hot(shares, CLASSES).float()
            smooth = shares * (1 - how.label_smoothing) + how.label_smoothing / CLASSES
            losses = -(smooth * model(mixed).log_softmax(1)).sum(1)
            rows = shares @ weights
            solver.zero_grad()
            torch.autograd.backward((rows * losses).mean())
            solver.step()
    return model
