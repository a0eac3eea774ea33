"""Recipes: the package's own, files, and what does not fit together."""

from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.training.recipe import read_recipe, recipe_names


def test_every_recipe_of_the_package_can_be_read():
    assert {"fine-tune", "modern", "classic", "from-scratch"} <= set(recipe_names())
    for name in recipe_names():
        assert read_recipe(name).about


def test_an_unknown_name_is_answered_with_those_that_there_are():
    with pytest.raises(
        InputError, match=r"there are linear-probe, classic, fine-tune, from-scratch.*or name a \.toml file"
    ):
        read_recipe("fine-tuned")


def test_a_file_with_a_wrong_line_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'about = "x"\nepochs = 2\nbatch_size = 8\nlearning_rate = 1e-3\nhead_learning_rate = 1\nspeed = 3\n'
    )
    with pytest.raises(InputError, match=r"mine.toml: speed: Extra inputs"):
        read_recipe(str(path))
    with pytest.raises(InputError, match="there is no such file"):
        read_recipe(str(tmp_path / "other.toml"))


def test_fewer_epochs_shorten_the_ends_of_a_recipe():
    recipe = read_recipe("fine-tune")
    assert recipe.with_changes() == recipe
    short = recipe.with_changes(epochs=2)
    assert (short.epochs, short.head_epochs, short.final_epochs) == (2, 0, 1)
    assert short.size_fraction_at(0) == recipe.size_fraction
    assert short.size_fraction_at(1) == recipe.final_size_fraction


def test_crops_must_be_shares():
    with pytest.raises(InputError, match="crop_scale"):
        read_recipe("fine-tune").with_changes(crop_scale=(0.9, 0.1))


def test_none_is_a_value_as_any_other():
    assert read_recipe("fine-tune").with_changes(ema_decay=None, clip_norm=None) == read_recipe(
        "fine-tune"
    ).model_copy(update={"ema_decay": None, "clip_norm": None})
