"""Knowledge distillation: three steps equal a plain loop, for one and two workers, and resumed runs end the same."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional

from batchcls.models.build import build_model
from batchcls.preprocessing import Preprocessing
from batchcls.training.augmentation import Mixing
from batchcls.training.loss import distillation_losses
from batchcls.training.optimizer import DDP_ARGUMENTS, schedule_factor
from batchcls.training.recipe import Recipe
from batchcls.training.sampling import LabeledRows, class_weights
from batchcls.training.teacher import TeacherEnsemble, open_ensemble
from batchcls.training.teacher_bundles import TeacherBundle
from batchcls.training.train_config import DistributedContext, TrainingSettings
from batchcls.training.trainer import Hooks, State, Training
from tests.helpers.training import (
    CLASSES,
    LABELS,
    PREPROCESSING,
    ROWS,
    Stores,
    hooks,
    identity,
    network,
    no_op,
    recipe,
    settings,
    teacher,
    train,
    weights_of,
    write_stores,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURE, WEIGHT = 3.0, 0.7
PERMUTED = ("mug", "other", "bag", "scarf", "cap")
OTHER_COLORS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def sized(height: int, width: int, **changes: object) -> Preprocessing:
    sides = {"input_height": height, "input_width": width, "resize_height": height, "resize_width": width}
    return PREPROCESSING.model_copy(update=sides | changes)


# Each of these has other classes, colors and sides than the student, and another library or kind of network.
LARGE = teacher(labels=PERMUTED, preprocessing=sized(48, 64, **OTHER_COLORS))
OTHER = teacher(
    "torchvision:mobilenet_v3_small", labels=(*LABELS, "other"), preprocessing=sized(32, 32, **OTHER_COLORS)
)


def three_steps(**changes: object) -> Recipe:
    """Three steps of plain gradient descent."""
    values = {
        "epochs": 1, "head_epochs": 0, "batch_size": 9, "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0,
        "learning_rate": 0.05, "head_learning_rate": 0.05, "layer_decay": 1.0, "ema_decay": None, "clip_norm": None,
        "distillation_weight": WEIGHT, "distillation_temperature": TEMPERATURE,
    }  # fmt: skip
    return recipe(**(values | changes))


def ensemble(chosen: TrainingSettings, *bundles: TeacherBundle) -> TeacherEnsemble | None:
    return open_ensemble(bundles, chosen, "cpu")


def reference_probabilities(pixels: Tensor, bundles: tuple[TeacherBundle, ...], size: Any) -> Tensor:
    """Mean probabilities (N, 3) of the student's categories, from images (N, 3, h, w) in 0..1."""
    found = []
    for one in bundles:
        config = one.bundle.config
        mean, std = (
            torch.tensor(values).reshape(1, 3, 1, 1)
            for values in (config.preprocessing.mean, config.preprocessing.std)
        )
        sides = size or (config.preprocessing.input_height, config.preprocessing.input_width)
        resized = functional.interpolate(pixels, sides, mode="bilinear", antialias=True)
        logits = build_model(one.bundle).eval()((resized - mean) / std).float()
        every = torch.softmax(logits / TEMPERATURE, dim=1)
        chosen = torch.stack([every[:, config.labels.index(label)] for label in LABELS], dim=1)
        found.append(chosen / chosen.sum(dim=1, keepdim=True))
    return torch.stack(found).mean(dim=0)


def reference(
    chosen: TrainingSettings, stores: Stores, bundles: tuple[TeacherBundle, ...], size: Any = None
) -> Tensor:
    """The weights after one epoch of a plain loop over the same augmented images."""
    model = network().eval()  # frozen statistics
    whole = Training(network(), ["fc"], chosen, DistributedContext(), hooks())
    steps = [step.batches[0] for step in whole._steps(0, stores[0], 0)]
    assert len(steps) == 3
    mixing = Mixing(chosen.recipe, CLASSES)
    counts = np.bincount(chosen.training.targets, minlength=CLASSES)
    balance = torch.from_numpy(class_weights(counts))
    for number, (images, targets, _) in enumerate(steps):
        mixed, shares = mixing(images.float() / 255, targets, chosen.seed, 0, number, 0, 0)
        if shares.dim() == 1:
            shares = functional.one_hot(shares, CLASSES).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=chosen.precision == "bf16"):
            logits = model((mixed - 0.5) / 0.5).float()
            with torch.no_grad():
                taught = reference_probabilities(mixed, bundles, size) if bundles else shares
        smoothed = shares * (1 - chosen.recipe.label_smoothing) + chosen.recipe.label_smoothing / CLASSES
        rows = -(smoothed * torch.log_softmax(logits, 1)).sum(1)
        if bundles:
            student = torch.log_softmax(logits / TEMPERATURE, 1)
            divergence = (taught * (taught.log() - student)).sum(1)
            rows = (1 - WEIGHT) * rows + WEIGHT * TEMPERATURE**2 * divergence
        if chosen.balance == "loss":
            rows = rows * (shares @ balance)
        model.zero_grad()
        rows.mean().backward()
        rate = chosen.recipe.learning_rate * schedule_factor(chosen.recipe, number, 3)
        with torch.no_grad():
            for value in model.parameters():
                value.sub_(rate * value.grad)
    return vector(model)


def vector(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values() if value.is_floating_point()])


def distance(found: Tensor, expected: Tensor) -> float:
    """The difference as a fraction of the change by training."""
    start = vector(network())
    return float((found - expected).norm() / (expected - start).norm())


@pytest.fixture
def stores(tmp_path: Path) -> Stores:
    return write_stores(tmp_path)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("bundles", [(LARGE,), (LARGE, OTHER)])
def test_three_steps_equal_a_plain_loop(
    stores: Stores, bundles: tuple[TeacherBundle, ...], micro_batch_size: int | None
):
    chosen = settings(recipe=three_steps())
    expected = reference(chosen, stores, bundles)
    chosen = settings(recipe=three_steps(), micro_batch_size=micro_batch_size)
    training, _, _ = train(chosen, stores, teachers=ensemble(chosen, *bundles))
    assert distance(weights_of(training), expected) < 1e-3
    assert distance(reference(chosen, stores, ()), expected) > 0.1


@pytest.mark.parametrize(
    "changes", [{"recipe": three_steps(mixup=0.4)}, {"recipe": three_steps(cutmix=1.0)}, {"balance": "loss"}]
)
def test_mixed_and_weighted_images_equal_a_plain_loop(stores: Stores, changes: dict[str, Any]):
    targets = np.zeros(ROWS, np.int32)
    targets[:7] = (1, 2, 2, 1, 2, 1, 1)
    rows = LabeledRows(np.arange(ROWS), targets)
    chosen = settings(**({"recipe": three_steps(), "training": rows} | changes))
    training, _, _ = train(chosen, stores, teachers=ensemble(chosen, LARGE))
    assert distance(weights_of(training), reference(chosen, stores, (LARGE,))) < 1e-3


def test_three_steps_in_bf16_equal_a_plain_loop(stores: Stores):
    chosen = settings(recipe=three_steps(), precision="bf16")
    training, _, _ = train(chosen, stores, teachers=ensemble(chosen, LARGE, OTHER))
    expected = reference(chosen, stores, (LARGE, OTHER))
    assert distance(weights_of(training), expected) < 0.05
    assert distance(weights_of(train(chosen, stores)[0]), expected) > 0.1


def test_smaller_crops_are_resized_to_the_same_fraction_of_the_teachers_input(stores: Stores):
    """Half of the student's 64 pixels are 32, and half of this teacher's 128 are 64."""
    large = teacher(labels=PERMUTED, preprocessing=sized(128, 128, **OTHER_COLORS))
    chosen = settings(recipe=three_steps(size_fraction=0.5), preprocessing=sized(64, 64))
    training, _, _ = train(chosen, stores, teachers=ensemble(chosen, large))
    assert distance(weights_of(training), reference(chosen, stores, (large,), size=(64, 64))) < 1e-3


def test_teacher_with_a_fixed_input_size_sees_that_size(stores: Stores):
    fixed = teacher("timm:test_vit", preprocessing=sized(64, 64), img_size=64, dynamic_img_size=False)
    chosen = settings(recipe=three_steps(size_fraction=0.5), preprocessing=sized(64, 64))
    training, _, _ = train(chosen, stores, teachers=ensemble(chosen, fixed))
    assert distance(weights_of(training), reference(chosen, stores, (fixed,), size=(64, 64))) < 1e-3


def test_teacher_is_not_trained(stores: Stores):
    chosen = settings(recipe=three_steps())
    taught = ensemble(chosen, LARGE)
    before = copy.deepcopy([one._model.state_dict() for one in taught._networks])
    train(chosen, stores, teachers=taught)
    for old, one in zip(before, taught._networks, strict=True):
        assert not one._model.training
        assert all(torch.equal(value, one._model.state_dict()[name]) for name, value in old.items())
        assert not any(value.requires_grad for value in one._model.parameters())


def test_divergence_is_zero_for_equal_predictions_and_scales_with_the_square_of_the_temperature():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for temperature in (1.0, 4.0):
        own = torch.log_softmax(logits / temperature, 1)
        assert distillation_losses(logits, own, temperature, None).abs().max() < 1e-12
        given = torch.softmax(other / temperature, 1)
        expected = (given * (given.log() - own)).sum(1) * temperature**2
        weights = torch.arange(5, dtype=torch.float64)
        found = distillation_losses(logits, given.log(), temperature, weights)
        torch.testing.assert_close(found, expected * weights)
        assert (found[1:] > 0).all()


def test_very_certain_teacher_gives_finite_losses():
    certain = torch.log_softmax(torch.tensor([[1e4, 0.0, -1e4]]), 1)
    student = torch.tensor([[0.0, 500.0, 0.0]], requires_grad=True)
    losses = distillation_losses(student, certain, 1.0, None)
    losses.sum().backward()
    assert losses.item() == pytest.approx(500)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def accumulating() -> TrainingSettings:
    """Three epochs in micro-batches, of which the first trains only the classifier."""
    return settings(recipe=recipe(), micro_batch_size=3)


def undisturbed_and_resumed(
    stores: Stores, context: DistributedContext, wrap: Callable[[nn.Module], nn.Module]
) -> list[Tensor]:
    """The weights of an undisturbed training, and of one that resumes from the second step of its second epoch."""
    chosen = accumulating()
    kept: dict[tuple[int, int], State] = {}
    interrupted = Hooks(
        wrap=wrap,
        step_done=no_op,
        epoch_done=no_op,
        is_checkpoint_due=lambda: True,
        checkpoint=lambda record, state: kept.update(
            {(record["epoch"], record["steps"]): copy.deepcopy(state())}
        ),
    )
    straight = Training(network(), ["fc"], chosen, context, interrupted, ensemble(chosen, LARGE, OTHER))
    assert straight.run(*stores) is None
    resumed = Training(network(), ["fc"], chosen, context, hooks(wrap), ensemble(chosen, LARGE, OTHER))
    resumed.restore(kept[1, 2])
    assert resumed.run(*stores) is None
    return [weights_of(straight), weights_of(resumed)]


def test_checkpoint_within_an_epoch_resumes_to_the_same_result(stores: Stores):
    straight, resumed = undisturbed_and_resumed(stores, DistributedContext(), identity)
    assert torch.equal(straight, resumed)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    stores = write_stores(Path(folder) / str(rank))
    wrap, context = partial(nn.parallel.DistributedDataParallel, **DDP_ARGUMENTS), DistributedContext(rank, 2)
    found: dict[str, Any] = {"both": undisturbed_and_resumed(stores, context, wrap)}
    for precision in ("fp32", "bf16"):
        chosen = settings(recipe=three_steps(), micro_batch_size=3, precision=precision)
        training, _, _ = train(chosen, stores, context, wrap, teachers=ensemble(chosen, LARGE, OTHER))
        found[precision] = weights_of(training)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.long
def test_two_workers_learn_from_a_teacher_like_one(tmp_path: Path, stores: Stores):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for precision, tolerance in (("fp32", 1e-3), ("bf16", 0.05)):
        expected = reference(settings(recipe=three_steps(), precision=precision), stores, (LARGE, OTHER))
        assert torch.equal(both[0][precision], both[1][precision])
        assert distance(both[0][precision], expected) < tolerance
    chosen = accumulating()
    alone, _, _ = train(chosen, stores, teachers=ensemble(chosen, LARGE, OTHER))
    for found in both:
        assert torch.equal(*found["both"])
        assert torch.allclose(found["both"][0], weights_of(alone), atol=2e-4)
