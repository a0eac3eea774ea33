"""Tests for parameter groups, schedules and frozen parameters."""

import pytest
import timm
import torch
from timm.layers import EvoNorm2dB0

from batchcls.training.optimizer import (
    batch_norms,
    describe,
    make_optimizer,
    schedule_factor,
    set_learning_rate,
    set_training_mode,
    train_head_only,
)
from batchcls.training.recipe import Recipe, read_recipe


def network() -> torch.nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


def recipe(**changes: object) -> Recipe:
    return read_recipe("fine-tune").with_changes(**changes)


def test_head_has_its_own_learning_rate_and_the_body_a_decreasing_one():
    model = network()
    optimizer = make_optimizer(
        model, ["fc"], recipe(learning_rate=1e-4, head_learning_rate=1e-2, layer_decay=0.5)
    )
    peaks = {
        name: group["peak"]
        for name, value in model.named_parameters()
        for group in optimizer.param_groups
        if any(value is other for other in group["params"])
    }
    assert peaks.keys() == dict(model.named_parameters()).keys()
    assert peaks["fc.weight"] == peaks["fc.bias"] == 1e-2
    assert peaks["conv1.0.weight"] < peaks["layer1.0.conv1.weight"] < peaks["layer4.0.conv1.weight"] <= 1e-4
    decays = {
        id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]
    }
    assert decays[id(model.fc.bias)] == 0
    assert decays[id(model.fc.weight)] == 0.05
    set_learning_rate(optimizer, 0.5)
    assert all(group["lr"] == group["peak"] / 2 for group in optimizer.param_groups)


def test_head_epochs_warm_up_quickly_and_precede_the_schedule():
    chosen = recipe(epochs=4, head_epochs=1, final_epochs=0, warmup_fraction=0.2)
    factors = [schedule_factor(chosen, step, 400) for step in range(400)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:100] == [1.0] * 90
    without = recipe(epochs=3, head_epochs=0, final_epochs=0, warmup_fraction=0.2)
    assert factors[100:] == [schedule_factor(without, step, 300) for step in range(300)]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
def test_schedule_increases_to_the_peak_and_decays(schedule: str):
    chosen = recipe(schedule=schedule, warmup_fraction=0.2, head_epochs=0)
    factors = [schedule_factor(chosen, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.04)
    assert max(factors) == factors[20] == pytest.approx(1.0)
    assert factors[:21] == sorted(factors[:21])
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[-1] < 0.01


def test_step_schedule_divides_by_ten_at_each_milestone():
    chosen = recipe(schedule="steps", warmup_fraction=0.0, milestones=(0.5, 0.75))
    assert [schedule_factor(chosen, step, 4) for step in range(4)] == pytest.approx([1, 1, 0.1, 0.01])


def test_parameters_and_statistics_are_frozen_separately():
    model = network()
    images = torch.randn(4, 3, 64, 64)
    before = model.bn1.running_mean.clone()
    assert set_training_mode(model, "frozen") == len(batch_norms(model)) > 0
    assert model.training
    model(images)
    assert torch.equal(model.bn1.running_mean, before)
    assert set_training_mode(model, "trained") == 0
    model(images)
    assert not torch.equal(model.bn1.running_mean, before)
    trainable = train_head_only(model, ["fc"], ["*"])
    assert set(trainable.names) == {"fc.weight", "fc.bias"}
    assert describe(trainable, model, "trained", 1).endswith("BatchNorm layers update their statistics")
    assert describe(trainable, model, "trained", 2).endswith(
        "update their statistics: each of 2 workers from its own images, averaged after every epoch"
    )
    assert "keep their statistics" in describe(trainable, model, "frozen", 2)


def test_statistics_of_other_normalization_layers_are_frozen_and_updated():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), EvoNorm2dB0(8))
    images = torch.randn(4, 3, 16, 16)
    before = [layer.running_var.clone() for layer in batch_norms(model)]
    set_training_mode(model, "frozen")
    model(images)
    assert all(
        torch.equal(*pair) for pair in zip(before, (x.running_var for x in batch_norms(model)), strict=True)
    )
    set_training_mode(model, "trained")
    model(images)
    assert not torch.equal(before[0], batch_norms(model)[0].running_var)
