"""Tests for recipes: those of the package, files, and inconsistent settings."""

from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.training.recipe import read_recipe, recipe_names


def test_all_built_in_recipes_are_valid():
    assert {"fine-tune", "modern", "classic", "from-scratch"} <= set(recipe_names())
    for name in recipe_names():
        assert read_recipe(name).about


def test_unknown_recipe_is_rejected_with_the_known_names():
    with pytest.raises(
        InputError, match=r"choose linear-probe, classic, fine-tune, from-scratch.*or a \.toml file"
    ):
        read_recipe("fine-tuned")


def test_invalid_setting_in_a_recipe_file_is_named(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'about = "x"\nepochs = 2\nbatch_size = 8\nlearning_rate = 1e-3\nhead_learning_rate = 1\nspeed = 3\n'
    )
    with pytest.raises(InputError, match=r"mine.toml: speed: Extra inputs"):
        read_recipe(str(path))
    with pytest.raises(InputError, match="there is no such file"):
        read_recipe(str(tmp_path / "other.toml"))


def test_fewer_epochs_reduce_head_and_final_epochs():
    recipe = read_recipe("fine-tune")
    assert recipe.with_changes() == recipe
    short = recipe.with_changes(epochs=2)
    assert (short.epochs, short.head_epochs, short.final_epochs) == (2, 0, 1)
    assert short.size_fraction_at(0) == recipe.size_fraction
    assert short.size_fraction_at(1) == recipe.final_size_fraction


def test_invalid_crop_scale_is_rejected():
    with pytest.raises(InputError, match="crop_scale"):
        read_recipe("fine-tune").with_changes(crop_scale=(0.9, 0.1))


def test_settings_can_be_changed_to_none():
    assert read_recipe("fine-tune").with_changes(ema_decay=None, clip_norm=None) == read_recipe(
        "fine-tune"
    ).model_copy(update={"ema_decay": None, "clip_norm": None})
