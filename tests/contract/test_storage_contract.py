"""Storage has the same guarantees on local disk and on a real S3 server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import InputError, StorageStoppedError
from batchcls.storage.compare_and_swap import compare_and_swap, read_versioned
from batchcls.storage.data_files import find_data_files
from batchcls.storage.filesystem import Storage, explain, join
from batchcls.storage.store_errors import resumable_errors
from tests.helpers.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from tests.conftest import S3Server

SECRET = "WrongSecretThatMustNeverBeShown"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that no other test uses."""
    if request.param == "local":
        return str(tmp_path)
    s3: S3Server = request.getfixturevalue("s3")
    return f"s3://{s3.bucket}/folder"


@pytest.fixture
def storage(root: str, request: pytest.FixtureRequest) -> Storage:
    if not root.startswith("s3"):
        return Storage()
    return Storage({"endpoint_url": request.getfixturevalue("s3").endpoint_url})


def test_files_are_written_read_and_replaced(storage: Storage, root: str) -> None:
    uri = join(root, "runs", "a b+%20.json")
    assert not storage.exists(uri)
    for data in (b"old", b"newer", b""):
        storage.write_atomic(uri, data)
        assert storage.read_bytes(uri) == data
        assert storage.size(uri) == len(data)
    assert storage.exists(uri)


def test_missing_file_is_not_found(storage: Storage, root: str) -> None:
    for request in (storage.read_bytes, storage.size):
        with pytest.raises(FileNotFoundError):
            request(join(root, "none"))


def test_exactly_one_exclusive_writer_succeeds(storage: Storage, root: str) -> None:
    uri, start = join(root, "lock"), threading.Barrier(8)

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


def test_retry_after_a_lost_response_recognizes_its_own_file(s3: S3Server) -> None:
    uri = f"s3://{s3.bucket}/lost/plan.json"
    with FaultyProxy(s3.endpoint_url) as proxy:
        storage = Storage({"endpoint_url": proxy.url})
        proxy.lose_responses_to = {"/plan.json"}
        storage.create_exclusive(uri, b"mine")
        assert proxy.seen["lost response"] == 1
        with pytest.raises(FileExistsError):
            storage.create_exclusive(uri, b"another's")
        assert storage.read_bytes(uri) == b"mine"
        proxy.lose_responses_to = {"/current.json"}
        pointer = f"s3://{s3.bucket}/lost/current.json"
        compare_and_swap(pointer, b"first", None, storage)
        proxy.lose_responses_to = {"/current.json"}
        compare_and_swap(pointer, b"second", read_versioned(pointer, storage), storage)
        assert proxy.seen["lost response"] == 3
        assert storage.read_bytes(pointer) == b"second"


def test_listing_is_recursive_sorted_complete_and_fresh(storage: Storage, root: str) -> None:
    assert storage.list_files(root) == []
    uris = [join(root, name) for name in ("a.parquet", "b/1.parquet", "b/2.parquet")]
    for uri in (*reversed(uris), join(root, "b/1.json"), root + "2/outside.parquet"):
        storage.write_atomic(uri, b"1234")
    listed = storage.list_files(root, ".parquet")
    assert [info.uri for info in listed] == uris
    assert {info.size for info in listed} == {4}
    Storage(storage._options).write_atomic(join(root, "b/3.parquet"), b"12345")
    assert [info.size for info in storage.list_files(root, ".parquet")] == [4, 4, 4, 5]
    assert [info.uri for info in storage.list_files(uris[0])] == uris[:1]
    found = find_data_files(join(root, "b/[12].parquet"), storage, lambda _: True)
    assert found is not None
    assert [info.uri for info in found.files] == uris[1:]
    found = find_data_files(join(root, "**/1.parquet"), storage, lambda _: True)
    assert found is not None
    assert [info.uri for info in found.files] == uris[1:2]


def test_arrow_reads_parquet_by_range(storage: Storage, root: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": range(1000), "y": range(1000)}), sink, row_group_size=100)
    uri = join(root, "t.parquet")
    storage.write_atomic(uri, sink.getvalue().to_pybytes())
    filesystem, path = storage.arrow_filesystem(uri)
    with filesystem.open_input_file(path) as file:
        group = pq.ParquetFile(file).read_row_group(3, columns=["y"])
    assert group.column("y").to_pylist() == list(range(300, 400))


def test_large_file_is_uploaded_in_parts(s3: S3Server) -> None:
    storage, uri = Storage({"endpoint_url": s3.endpoint_url}), f"s3://{s3.bucket}/large"
    data = bytes(range(256)) * 140_000
    storage.write_atomic(uri, data)
    (info,) = storage.list_files(uri)
    assert info.size == len(data)
    assert info.etag is not None
    assert "-" in info.etag
    assert storage.read_bytes(uri) == data


def test_etag_depends_on_the_content(s3: S3Server) -> None:
    storage, uri = Storage({"endpoint_url": s3.endpoint_url}), f"s3://{s3.bucket}/tagged"
    tags = []
    for data in (b"one", b"two", b"one"):
        storage.write_atomic(uri, data)
        tags.append(storage.list_files(uri)[0].etag)
    assert tags[0] == tags[2] != tags[1]


Request = Callable[[Storage, str], object]
REQUESTS: dict[str, Request] = {
    "read": lambda storage, uri: storage.read_bytes(uri),
    "list": lambda storage, uri: storage.list_files(uri),
    "write": lambda storage, uri: storage.write_atomic(uri, b"x"),
    "create": lambda storage, uri: storage.create_exclusive(uri, b"x"),
}


def explained(storage: Storage, uri: str, request: Request) -> str:
    with pytest.raises(InputError) as raised, explain(uri):
        request(storage, uri)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"{uri}: ")
    assert raised.value.__cause__ is None
    return message


@pytest.mark.parametrize(
    ("credentials", "code", "remedy"),
    [
        ({"key": "WRONGKEY", "secret": SECRET}, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        ({"key": "RIGHT", "secret": SECRET}, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ({"anon": True}, "AccessDenied", "permissions"),
    ],
)
def test_wrong_credentials_are_explained_without_showing_them(
    s3: S3Server, credentials: dict[str, object], code: str, remedy: str
) -> None:
    right = s3.environment["AWS_ACCESS_KEY_ID"]
    if credentials.get("key") == "RIGHT":
        credentials = {**credentials, "key": right}
    storage = Storage({"endpoint_url": s3.endpoint_url, **credentials})
    secrets = (SECRET, "WRONGKEY", right, s3.environment["AWS_SECRET_ACCESS_KEY"])
    for name, request in REQUESTS.items():
        message = explained(storage, f"s3://{s3.bucket}/a", request)
        assert message.endswith(f"({code})"), name
        assert remedy in message
        assert not any(secret in message + repr(storage) for secret in secrets)


def test_response_without_error_code_is_explained_by_its_status(s3: S3Server) -> None:
    storage = Storage({"endpoint_url": s3.endpoint_url, "anon": True})
    assert "permissions" in explained(
        storage, f"s3://{s3.bucket}/a", lambda storage, uri: storage.exists(uri)
    )


def test_a_missing_bucket_is_explained(s3: S3Server) -> None:
    storage = Storage({"endpoint_url": s3.endpoint_url})
    for name, request in REQUESTS.items():
        message = explained(storage, "s3://no-such-bucket-here/folder", request)
        assert message.endswith("no such bucket; create it or correct its name (NoSuchBucket)"), name


def test_missing_object_and_invalid_bucket_name_are_explained(s3: S3Server) -> None:
    storage = Storage({"endpoint_url": s3.endpoint_url})
    assert "check the path (NoSuchKey)" in explained(storage, f"s3://{s3.bucket}/none", REQUESTS["read"])
    assert "correct the URI" in explained(storage, "s3://A Bucket/none", REQUESTS["read"])


def test_unreachable_endpoint_is_explained(s3: S3Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        one_attempt = {"retries": {"total_max_attempts": 1}}
        storage = Storage({"endpoint_url": endpoint, "config_kwargs": one_attempt})
        message = explained(storage, "s3://bucket/a", REQUESTS["read"])
    assert "check the endpoint (AWS_ENDPOINT_URL)" in message
    assert message.endswith("(EndpointConnectionError)")


def test_missing_credentials_are_explained(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    storage = Storage({"endpoint_url": s3.endpoint_url, "default_block_size": 1 << 20})
    message = explained(storage, f"s3://{s3.bucket}/a", REQUESTS["read"])
    assert "no credentials found; set AWS_ACCESS_KEY_ID" in message


def test_file_used_as_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = explained(Storage(), f"{tmp_path}/file/below", REQUESTS["write"])
    assert "a part of this path is a file" in message or "it already exists" in message


def test_folders_are_listed_written_and_removed(storage: Storage, root: str, tmp_path: Path) -> None:
    top, source = join(root, "runs"), tmp_path / "source"
    source.write_bytes(b"x" * (6 << 20))
    assert storage.list_folders(top) == []
    for name in ("b", "a"):
        storage.write_file(join(top, name, "deep", "part"), source)
    storage.write_atomic(join(top, "file"), b"no folder")
    assert storage.list_folders(top) == ["a", "b"]
    assert storage.size(join(top, "a", "deep", "part")) == 6 << 20
    storage.remove([])
    storage.remove([join(top, "a", "deep", "part")])
    storage.remove_empty_folders(join(top, "a"))
    assert storage.list_folders(top) == ["b"]
    storage.write_atomic(join(top, "bb", "file"), b"a neighbor whose name begins alike")
    storage.write_atomic(join(top, "b", "kept", "file"), b"1")
    storage.write_atomic(join(top, "b", "kept-not"), b"22")
    assert storage.remove_folder(join(top, "b"), frozenset({"kept"})) == (6 << 20) + 2
    assert [info.uri for info in storage.list_files(join(top, "b"))] == [join(top, "b", "kept", "file")]
    assert storage.remove_folder(join(top, "b")) == 1
    assert storage.remove_folder(join(top, "b")) == 0
    assert storage.list_folders(top) == ["bb"]
    assert storage.remove_folder(top) > 0
    assert not storage.exists(join(top, "file"))


class BreakingOff(BaseHTTPRequestHandler):
    """A store whose responses are interrupted."""

    def do_GET(self) -> None:
        """Send half of the announced body."""
        self.send_response(200)
        self.send_header("Content-Length", "510")
        self.end_headers()
        self.wfile.write(b"x" * 255)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def test_interrupted_responses_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with ThreadingHTTPServer(("127.0.0.1", 0), BreakingOff) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        storage = Storage({"endpoint_url": f"http://127.0.0.1:{server.server_port}"})
        for around, kind in ((explain, InputError), (resumable_errors, StorageStoppedError)):
            with (
                pytest.raises(kind, match=r"s3://shop/a.json: the connection .* was lost repeatedly"),
                around("s3://shop/a.json"),
            ):
                storage.read_bytes("s3://shop/a.json")
        server.shutdown()
