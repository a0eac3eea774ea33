"""The compile cache: entries are created once per node, and are complete or absent."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.models.engines.compile_cache import CompileCache

KEY = {"name": "openvino timm:resnet50", "bundle": "0" * 64, "version": "1"}

# A process that makes a conversion: says that it has begun, then waits for a line, then writes.
MAKER = """
import sys
from pathlib import Path
from batchcls.models.engines.compile_cache import CompileCache
def make(folder):
    (folder / "half").write_text("half")
    print("begun", flush=True)
    sys.stdin.readline()
    (folder / "network").write_text("whole")
print(CompileCache(Path(sys.argv[1])).get({key!r}, make), flush=True)
""".replace("{key!r}", repr(KEY))


@pytest.fixture
def conversions(tmp_path: Path) -> CompileCache:
    return CompileCache(tmp_path / "engines")


def write(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "network").write_text("whole")
    (folder / "inner" / "weights").write_bytes(bytes(range(256)))


def refuse(folder: Path) -> None:
    raise AssertionError("made again")


def maker(conversions: CompileCache, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(conversions.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def visible(conversions: CompileCache) -> list[str]:
    return [path.name for path in conversions.folder.iterdir() if not path.name.endswith(".lock")]


def test_a_conversion_is_made_once_and_found_again(conversions):
    folder = conversions.get(KEY, write)
    assert (folder / "network").read_text() == "whole"
    assert conversions.get(dict(reversed(KEY.items())), refuse) == folder
    assert pickle.loads(pickle.dumps(conversions)).get(KEY, refuse) == folder


def test_its_folder_can_be_recognized_and_another_key_has_another(conversions):
    folder = conversions.get(KEY, write)
    assert folder.name.startswith("openvino-timm-resnet50-")
    assert json.loads((folder / "key.json").read_text())["key"] == KEY
    assert conversions.get({**KEY, "version": "2"}, write) != folder
    assert conversions.get({"other": "../../x"}, write).parent == conversions.folder


def test_a_second_process_waits_for_the_first_and_takes_what_it_made(conversions, clean_environment):
    first = maker(conversions, clean_environment)
    assert first.stdout.readline() == "begun\n"
    second = maker(conversions, clean_environment)
    found = []
    thread = threading.Thread(target=lambda: found.append(conversions.get(KEY, refuse)))
    thread.start()
    out, _ = first.communicate("go\n")
    other, _ = second.communicate("go\n")
    thread.join()
    assert out == other == f"{found[0]}\n"  # the second never said that it had begun
    assert (first.returncode, second.returncode) == (0, 0)


def test_what_a_killed_process_left_is_not_used_and_cleaned_away(conversions, clean_environment):
    process = maker(conversions, clean_environment)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = visible(conversions)
    assert (conversions.folder / left / "half").exists()
    folder = conversions.get(KEY, write)
    assert not (folder / "half").exists()
    assert visible(conversions) == [folder.name]


def test_a_conversion_that_fails_leaves_nothing_and_is_tried_again(conversions):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no such operation")

    with pytest.raises(RuntimeError, match="no such operation"):
        conversions.get(KEY, fail)
    assert visible(conversions) == []
    assert (conversions.get(KEY, write) / "network").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "network").unlink(),
        lambda folder: os.truncate(folder / "inner" / "weights", 100),
        lambda folder: (folder / "network").write_text("Whole"),
        lambda folder: (folder / "key.json").write_text("{"),
        lambda folder: (folder / "key.json").write_text("[]"),
        lambda folder: (folder / "key.json").unlink(),
    ],
    ids=["a file is gone", "cut off", "changed", "record is no JSON", "record of another form", "no record"],
)
def test_a_damaged_conversion_is_made_again(conversions, damage):
    folder = conversions.get(KEY, write)
    damage(folder)
    assert conversions.get(KEY, write) == folder
    assert (folder / "network").read_text() == "whole"
    assert (folder / "inner" / "weights").stat().st_size == 256
    conversions.get(KEY, refuse)


def test_a_folder_that_cannot_be_written_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot be cached in .*file/engines .*; set BATCHCLS_CACHE_DIR to a"
    ):
        CompileCache.from_cache_dir(str(tmp_path / "file")).get(KEY, write)


def test_the_cache_folder_is_the_named_one_or_the_environments_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("BATCHCLS_CACHE_DIR", raising=False)
    assert CompileCache.from_cache_dir(None).folder == tmp_path / "home" / ".cache" / "batchcls" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CompileCache.from_cache_dir(None).folder == tmp_path / "xdg" / "batchcls" / "engines"
    monkeypatch.setenv("BATCHCLS_CACHE_DIR", str(tmp_path / "cache"))
    assert CompileCache.from_cache_dir(None).folder == tmp_path / "cache" / "engines"
    assert CompileCache.from_cache_dir(str(tmp_path / "named")).folder == tmp_path / "named" / "engines"
    assert CompileCache.from_cache_dir("~/named").folder == tmp_path / "home" / "named" / "engines"
    assert not any(tmp_path.iterdir())
