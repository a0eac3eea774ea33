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

# A process that creates an entry: prints "started", waits for a line on stdin, then writes.
MAKER = """
import sys
from pathlib import Path
from batchcls.models.engines.compile_cache import CompileCache
def make(folder):
    (folder / "half").write_text("half")
    print("started", flush=True)
    sys.stdin.readline()
    (folder / "network").write_text("whole")
print(CompileCache(Path(sys.argv[1])).get({key!r}, make), flush=True)
""".replace("{key!r}", repr(KEY))


@pytest.fixture
def cache(tmp_path: Path) -> CompileCache:
    return CompileCache(tmp_path / "engines")


def write(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "network").write_text("whole")
    (folder / "inner" / "weights").write_bytes(bytes(range(256)))


def fail_build(folder: Path) -> None:
    raise AssertionError("created again")


def start_creator(cache: CompileCache, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(cache.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def visible(cache: CompileCache) -> list[str]:
    return [path.name for path in cache.folder.iterdir() if not path.name.endswith(".lock")]


def test_entry_is_created_once_and_found_again(cache):
    folder = cache.get(KEY, write)
    assert (folder / "network").read_text() == "whole"
    assert cache.get(dict(reversed(KEY.items())), fail_build) == folder
    assert pickle.loads(pickle.dumps(cache)).get(KEY, fail_build) == folder


def test_folder_name_is_readable_and_unique_per_key(cache):
    folder = cache.get(KEY, write)
    assert folder.name.startswith("openvino-timm-resnet50-")
    assert json.loads((folder / "key.json").read_text())["key"] == KEY
    assert cache.get({**KEY, "version": "2"}, write) != folder
    assert cache.get({"other": "../../x"}, write).parent == cache.folder


def test_second_process_waits_and_uses_the_same_entry(cache, clean_environment):
    first = start_creator(cache, clean_environment)
    assert first.stdout.readline() == "started\n"
    second = start_creator(cache, clean_environment)
    found = []
    thread = threading.Thread(target=lambda: found.append(cache.get(KEY, fail_build)))
    thread.start()
    out, _ = first.communicate("go\n")
    other, _ = second.communicate("go\n")
    thread.join()
    assert out == other == f"{found[0]}\n"  # the second process did not print "started"
    assert (first.returncode, second.returncode) == (0, 0)


def test_leftovers_of_a_killed_process_are_removed(cache, clean_environment):
    process = start_creator(cache, clean_environment)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = visible(cache)
    assert (cache.folder / leftover / "half").exists()
    folder = cache.get(KEY, write)
    assert not (folder / "half").exists()
    assert visible(cache) == [folder.name]


def test_failed_creation_leaves_nothing_and_can_be_repeated(cache):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("no such operation")

    with pytest.raises(RuntimeError, match="no such operation"):
        cache.get(KEY, fail)
    assert visible(cache) == []
    assert (cache.get(KEY, write) / "network").exists()


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
    ids=["missing file", "truncated", "modified", "record is not JSON", "record is not a dict", "no record"],
)
def test_damaged_entry_is_created_again(cache, damage):
    folder = cache.get(KEY, write)
    damage(folder)
    assert cache.get(KEY, write) == folder
    assert (folder / "network").read_text() == "whole"
    assert (folder / "inner" / "weights").stat().st_size == 256
    cache.get(KEY, fail_build)


def test_unwritable_folder_is_rejected_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"cannot be cached in .*file/engines .*; set BATCHCLS_CACHE_DIR to a"
    ):
        CompileCache.from_cache_dir(str(tmp_path / "file")).get(KEY, write)


def test_cache_folder_precedence(tmp_path, monkeypatch):
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
