"""The state folder belongs to one run at a time."""

import json
from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage
from batchcls.training.work_dir import digest_of, find_claim, finish_run, take_claim

DECIDES = {"seed": 1, "recipe": {"epochs": 2, "crop_scale": (0.3, 1.0)}}


def claim(folder: Path, decides: dict | None = None, *, restart: bool = False):
    decides = decides or DECIDES
    found = find_claim(str(folder), decides, Storage(), restart=restart)
    if not found.is_resumed:
        take_claim(str(folder), found, decides, {"batch_size": 32}, Storage())
    return found


def test_the_same_command_finds_its_run_again(tmp_path: Path):
    first = claim(tmp_path)
    again = claim(tmp_path)
    assert (first.is_resumed, again.is_resumed) == (False, True)
    assert first.run_id == again.run_id
    assert again.plan == {"batch_size": 32}


def test_nothing_is_written_before_the_folder_is_taken(tmp_path: Path):
    assert find_claim(str(tmp_path / "state"), DECIDES, Storage(), restart=False).plan is None
    assert not (tmp_path / "state").exists()


def test_a_finished_run_is_not_gone_on_with(tmp_path: Path):
    first = claim(tmp_path)
    finish_run(str(tmp_path), Storage())
    second = claim(tmp_path)
    assert not second.is_resumed
    assert second.run_id != first.run_id


def test_a_state_folder_that_was_removed_has_no_run_to_finish(tmp_path: Path):
    finish_run(str(tmp_path), Storage())
    assert not list(tmp_path.iterdir())


def test_another_command_is_refused_and_told_the_difference(tmp_path: Path):
    first = claim(tmp_path)
    with pytest.raises(InputError, match=f"unfinished run {first.run_id}, which differs in seed; "):
        claim(tmp_path, DECIDES | {"seed": 2})
    restarted = claim(tmp_path, DECIDES | {"seed": 2}, restart=True)
    assert not restarted.is_resumed
    assert claim(tmp_path, DECIDES | {"seed": 2}).run_id == restarted.run_id


@pytest.mark.parametrize("content", ["{", "[]", "{}", "7"])
def test_a_damaged_record_is_named(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run.json is damaged.*--restart"):
        claim(tmp_path)


def test_the_digest_does_not_depend_on_the_order_of_names():
    assert digest_of(DECIDES) == digest_of(dict(reversed(json.loads(json.dumps(DECIDES)).items())))
    assert digest_of(DECIDES) != digest_of(DECIDES | {"seed": 2})
