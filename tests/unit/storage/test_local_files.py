"""Atomic writes and exclusive creation on file systems without hard links, locks or folder sync."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchcls.storage.local_files import create_local, file_lock, write_local
from tests.conftest import REPOSITORY
from tests.helpers.blocked_calls import can_block_calls

LINKS = {"link": errno.EPERM, "linkat": errno.EPERM}
RENAME = {"renameat2": errno.EINVAL}
LACKING = {
    "nothing": {},
    "links, errors of FAT and SMB": LINKS,
    "links, errors of some FUSE mounts": {"link": errno.ENOSYS, "linkat": errno.ENOSYS},
    "links, other errors": {"link": errno.EOPNOTSUPP, "linkat": errno.EOPNOTSUPP},
    "links, as missing rights": {"link": errno.EACCES, "linkat": errno.EACCES},
    "links, too many": {"link": errno.EMLINK, "linkat": errno.EMLINK},
    "links and renames": LINKS | RENAME,
    "links, renames and locks": LINKS | RENAME | {"flock": errno.ENOLCK},
    "locks and syncs": {"flock": errno.ENOSYS, "fsync": errno.EINVAL},
    "all of it": LINKS | RENAME | {"flock": errno.EOPNOTSUPP, "fsync": errno.EINVAL},
}

_BEGIN = """
import json, sys, threading
from pathlib import Path
from tests.helpers.blocked_calls import block_calls
try:
    block_calls(json.loads(sys.argv[1]))
except OSError as error:
    print(error)
    sys.exit(77)
"""

_CREATE = (
    _BEGIN
    + """
from batchcls.storage.local_files import create_local
print("ready", flush=True)
sys.stdin.readline()
wins = []
def write(writer):
    for number in range(40):
        try:
            create_local(f"{sys.argv[2]}/new/{number}", f"{sys.argv[3]} {writer} ".encode() * 20_000)
        except FileExistsError:
            continue
        wins.append(number)
threads = [threading.Thread(target=write, args=(writer,)) for writer in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(wins))
"""
)

_PUBLISH = (
    _BEGIN
    + """
from batchcls.storage.filesystem import Storage
from batchcls.storage.compare_and_swap import VersionConflictError, compare_and_swap, read_versioned
uri = sys.argv[2] + "/current.json"
compare_and_swap(uri, b"first", None, Storage())
versioned = read_versioned(uri, Storage())
compare_and_swap(uri, b"second", versioned, Storage())
try:
    compare_and_swap(uri, b"third", versioned, Storage())
except VersionConflictError:
    print(Path(uri).read_text())
"""
)


def start(code: str, lacking: dict[str, int], *arguments: str) -> subprocess.Popen[str]:
    if not can_block_calls():
        pytest.skip("no filter of system calls for this machine")
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(lacking), *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate("go\n")
    if process.returncode == 77:
        pytest.skip(f"no filter of system calls here: {out}")
    assert process.returncode == 0
    return out.splitlines()[-1]


@pytest.mark.parametrize("lacking", LACKING.values(), ids=LACKING.keys())
def test_exactly_one_writer_creates_a_file_on_any_file_system(tmp_path: Path, lacking: dict[str, int]):
    writers = [start(_CREATE, lacking, str(tmp_path), name) for name in ("a", "b")]
    won = [number for writer in writers for number in json.loads(end(writer))]
    assert sorted(won) == list(range(40))
    for number in range(40):
        data = (tmp_path / "new" / str(number)).read_bytes()
        assert data == data[:4] * 20_000
    names = {path.name for path in (tmp_path / "new").iterdir() if not path.name.endswith(".lock")}
    assert names == {str(number) for number in range(40)}
    assert RENAME.keys() <= lacking.keys() or not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize("lacking", LACKING.values(), ids=LACKING.keys())
def test_compare_and_swap_works_on_any_file_system(tmp_path: Path, lacking: dict[str, int]):
    assert end(start(_PUBLISH, lacking, str(tmp_path))) == "second"


def test_create_fails_if_any_entry_has_the_name(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"old")
    for name in ("folder", "dangling", "file"):
        with pytest.raises(FileExistsError):
            create_local(str(tmp_path / name), b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "folder"]


def test_file_used_as_a_parent_folder_is_not_a_directory(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for write in (write_local, create_local):
        with pytest.raises(NotADirectoryError):
            write(str(tmp_path / "file" / "below" / "new"), b"new")


def test_lock_is_released_when_its_holder_dies(tmp_path: Path):
    code = "from batchcls.storage.local_files import file_lock\nfrom pathlib import Path\nimport sys\n" + (
        "with file_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with file_lock(tmp_path / "lock") as is_locked:
        assert is_locked


def test_created_folders_are_synced_from_the_top_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    create_local(str(tmp_path / "a" / "b" / "file"), b"data")
    assert [*synced[:2], synced[-1]] == [".", "a", "a/b"]
    assert len(synced) == 4  # and the file itself


def test_write_is_retried_if_its_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    link, removed = os.link, []

    def remove_first(source: Path, target: Path, **more: bool) -> None:
        if not removed:
            removed.append(source)
            Path(source).unlink()
            Path(source).parent.rmdir()
        link(source, target, **more)

    monkeypatch.setattr(os, "link", remove_first)
    create_local(str(tmp_path / "lease" / "000001.json"), b"data")
    assert removed
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["000001.json"]
    assert (tmp_path / "lease" / "000001.json").read_bytes() == b"data"
