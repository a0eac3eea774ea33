"""Storage on local disk and in memory."""

import errno
import os
import pickle
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import BatchclsError, InputError, StorageStoppedError
from batchcls.storage.filesystem import Storage, UnsupportedSchemeError, explain, write_files


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_write_replaces_a_file_and_leaves_no_other_files(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "new" / "folder" / "a.json")
    storage.write_atomic(uri, b"old")
    storage.write_atomic(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    assert storage.read_bytes(f"file://{uri}") == b"new"
    assert (storage.exists(uri), storage.size(uri)) == (True, 3)
    assert names(tmp_path / "new" / "folder") == ["a.json"]


def test_readers_never_see_a_partial_file(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "current.json")
    versions = [bytes([value]) * 200_000 for value in range(2)]
    storage.write_atomic(uri, versions[0])
    done = threading.Event()

    def read_all() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(storage.read_bytes(uri))
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read_all) for _ in range(2)]
        for round_number in range(60):
            storage.write_atomic(uri, versions[round_number % 2])
        done.set()
        assert set().union(*(reader.result() for reader in readers)) <= set(versions)


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    storage, uri = Storage(), str(tmp_path / "part.parquet")
    storage.write_atomic(uri, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BatchclsError, match="no space left") as raised, explain(uri):
            storage.write_atomic(uri, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not isinstance(raised.value, InputError)
    assert uri in str(raised.value)
    assert names(tmp_path) == ["part.parquet"]
    assert storage.read_bytes(uri) == b"old"


def test_full_device_is_reported() -> None:
    with (
        pytest.raises(OSError, match="No space") as raised,
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(BatchclsError, match="no space left"), explain("/mnt/a"):
        raise raised.value


def test_exactly_one_exclusive_writer_succeeds(tmp_path: Path) -> None:
    storage, uri, start = Storage(), str(tmp_path / "lock"), threading.Barrier(8)

    def write(writer: int) -> int | None:
        start.wait()
        try:
            storage.create_exclusive(uri, f"writer {writer}".encode())
        except FileExistsError:
            return None
        return writer

    with ThreadPoolExecutor(8) as pool:
        winners = [writer for writer in pool.map(write, range(8)) if writer is not None]
    assert len(winners) == 1
    assert storage.read_bytes(uri) == f"writer {winners[0]}".encode()
    assert names(tmp_path) == ["lock"]


def test_files_are_listed_recursively_sorted_and_by_suffix(tmp_path: Path) -> None:
    storage = Storage()
    for name in ("b/2.parquet", "a.parquet", "b/1.parquet", "b/1.json", "b2/3.parquet"):
        storage.write_atomic(str(tmp_path / name), name.encode())
    (tmp_path / "folder.parquet").mkdir()
    listed = storage.list_files(str(tmp_path), ".parquet")
    assert [os.path.relpath(info.uri, tmp_path) for info in listed] == [
        "a.parquet",
        "b/1.parquet",
        "b/2.parquet",
        "b2/3.parquet",
    ]
    assert [(info.size, info.etag) for info in listed][:2] == [(9, None), (11, None)]
    assert [info.uri for info in storage.list_files(str(tmp_path / "a.parquet"))] == [
        str(tmp_path / "a.parquet")
    ]
    assert storage.list_files(str(tmp_path / "nowhere")) == []


def test_arrow_reads_local_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "a.parquet")
    filesystem, path = Storage().arrow_filesystem(f"file://{tmp_path}/a.parquet")
    assert pq.read_table(path, filesystem=filesystem).column("x").to_pylist() == [1, 2]


def test_other_fsspec_schemes_are_supported() -> None:
    storage, uri = Storage(), "memory://test-storage/runs/a.json"
    storage.write_atomic(uri, b"new")
    assert (storage.read_bytes(uri), storage.exists(uri), storage.size(uri)) == (b"new", True, 3)
    assert storage.exists("memory://test-storage/none") is False
    assert [info.size for info in storage.list_files("memory://test-storage", ".json")] == [3]
    with pytest.raises(FileExistsError):
        storage.create_exclusive(uri, b"other")
    pq_uri = "memory://test-storage/t.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": [1]}), sink)
    storage.write_atomic(pq_uri, sink.getvalue().to_pybytes())
    filesystem, path = storage.arrow_filesystem(pq_uri)
    assert pq.read_table(path, filesystem=filesystem).num_rows == 1


def test_asynchronous_filesystem_is_shared_by_threads_but_not_by_processes() -> None:
    storage = Storage({"anon": True})
    with ThreadPoolExecutor(8) as pool:
        objects = {id(fs) for fs, _ in pool.map(storage.filesystem, ["s3://b/k", "S3://c/k"] * 20)}
    assert len(objects) == 1
    assert storage.filesystem("S3://c/k")[1] == "c/k"
    copy = pickle.loads(pickle.dumps(storage))
    assert id(copy.filesystem("s3://b/k")[0]) in objects
    assert id(Storage({"anon": False}).filesystem("s3://b/k")[0]) not in objects
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        made_new = id(storage.filesystem("s3://b/k")[0]) not in objects
        os.write(writer, b"new" if made_new else b"old")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 3) == b"new"


def test_unknown_scheme_error_contains_no_secrets() -> None:
    with pytest.raises(UnsupportedSchemeError, match=r"nosuch://host/a: no filesystem supports 'nosuch://'"):
        Storage().read_bytes("nosuch://ada:password@host/a?token=1")


def test_scheme_with_a_missing_package_is_named() -> None:
    with pytest.raises(UnsupportedSchemeError, match="package for 'oss://' is missing"):
        Storage().filesystem("oss://bucket/key")


def test_unknown_s3_option_is_rejected_with_the_supported_ones() -> None:
    with pytest.raises(
        InputError, match=r"unknown storage options for s3: endpoint; supported are .*endpoint_url"
    ):
        Storage({"endpoint": "http://127.0.0.1:9", "secret": "SECRET"}).filesystem("s3://b/k")


def test_repr_hides_credentials() -> None:
    storage = Storage({"key": "KEYKEY", "secret": "SECRET", "endpoint_url": "http://store:9000"})
    assert repr(storage) == "Storage({'key': '***', 'secret': '***', 'endpoint_url': 'http://store:9000'})"


def test_missing_files_and_folders_are_explained_in_one_line(tmp_path: Path) -> None:
    storage = Storage()
    for uri, remedy in [
        (
            f"{tmp_path}/none.parquet",
            r"there is no such file or object; check the path \(FileNotFoundError\)",
        ),
        (str(tmp_path), r"this is a folder, but a file is expected \(IsADirectoryError\)"),
    ]:
        with pytest.raises(InputError, match=remedy) as raised, explain(uri):
            storage.read_bytes(uri)
        assert str(raised.value).startswith(f"{uri}: ")
        assert "\n" not in str(raised.value)


def test_explain_does_not_change_input_errors() -> None:
    own = InputError("the manifest has no column item_id")
    with pytest.raises(InputError) as raised, explain("s3://b/k"):
        raise own
    assert raised.value is own


def test_write_files_raises_input_error_only_for_the_first_file(tmp_path: Path):
    files = {"weights": b"1", "record": b"2"}
    assert write_files(str(tmp_path / "good"), files, Storage()) == [
        str(tmp_path / "good" / name) for name in files
    ]
    (tmp_path / "first" / "weights").mkdir(parents=True)
    with pytest.raises(InputError):
        write_files(str(tmp_path / "first"), files, Storage())
    (tmp_path / "later" / "record").mkdir(parents=True)
    with pytest.raises(StorageStoppedError):
        write_files(str(tmp_path / "later"), files, Storage())


def test_list_direct_files(tmp_path: Path):
    for name in ("b.json", "a.json", "below/c.json"):
        Storage().write_atomic(str(tmp_path / name), b"12")
    (tmp_path / "dangling").symlink_to("nowhere")
    found = Storage().list_direct_files(str(tmp_path))
    assert [(info.uri, info.size) for info in found] == [
        (str(tmp_path / name), 2) for name in ("a.json", "b.json")
    ]
    assert Storage().list_direct_files(str(tmp_path / "none")) == []
