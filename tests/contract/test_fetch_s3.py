"""Fetching from a real S3 server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import botocore.session
import pytest
import s3fs
from botocore.config import Config

from batchcls.images.fetch import Fetched, Fetcher, FetchPolicy
from batchcls.schema import Reason
from batchcls.storage.filesystem import Storage

if TYPE_CHECKING:
    from tests.conftest import S3Server

SECRET = "WrongSecretThatMustNeverBeShown"
"""A wrong secret key, unlike any other text in messages."""


@pytest.fixture
def fetcher(s3: S3Server) -> Fetcher:
    return Fetcher(FetchPolicy(storage_options={"endpoint_url": s3.endpoint_url}))


def put(s3: S3Server, key: str, data: bytes) -> str:
    uri = f"s3://{s3.bucket}/{key}"
    Storage({"endpoint_url": s3.endpoint_url}).write_atomic(uri, data)
    return uri


def client_of(s3: S3Server) -> Any:
    return botocore.session.Session().create_client(
        "s3", endpoint_url=s3.endpoint_url, region_name="us-east-1", config=Config(signature_version="s3v4")
    )


def outcome(fetched: Fetched) -> tuple[Reason, str, int]:
    assert fetched.data is None
    assert fetched.failure is not None
    return fetched.failure.reason, fetched.failure.detail, fetched.attempts


def test_complete_object_is_fetched(s3: S3Server, fetcher: Fetcher) -> None:
    assert fetcher.fetch(put(s3, "a b/ä+%20#?.jpg", b"pixels")) == Fetched(b"pixels", None, 1, 6)
    assert fetcher.fetch(put(s3, "empty.jpg", b"")) == Fetched(b"", None, 1, 0)


@pytest.mark.parametrize(
    "key",
    [
        *("a%2Fb.jpg", "a b+c@d.jpg", "ä/你好.jpg", "a//b///c.jpg", "a/../b.jpg", "../c.jpg", "./d.jpg"),
        *("100%.jpg", "a;b=c&d#e?f", "/leading.jpg", "folder/", "folder///", "a?version=1", "[1]*{2}.jpg"),
    ],
)
def test_key_is_requested_verbatim(s3: S3Server, fetcher: Fetcher, key: str) -> None:
    client_of(s3).put_object(Bucket=s3.bucket, Key=key, Body=key.encode())
    uri = f"s3://{s3.bucket}/{key}"
    fetched = fetcher.fetch(uri)
    assert fetched.data == key.encode()
    assert fetched.version == fetcher.version(uri) is not None


def test_version_id_selects_an_object_version(s3: S3Server, fetcher: Fetcher) -> None:
    client = client_of(s3)
    client.put_bucket_versioning(Bucket=s3.bucket, VersioningConfiguration={"Status": "Enabled"})
    ids = [
        client.put_object(Bucket=s3.bucket, Key="a b.jpg", Body=body)["VersionId"]
        for body in (b"old", b"new")
    ]
    uri = f"s3://{s3.bucket}/a b.jpg"
    assert [fetcher.fetch(f"{uri}?versionId={one}").data for one in ids] == [b"old", b"new"]
    assert fetcher.fetch(uri).data == b"new"
    assert fetcher.version(f"{uri}?versionId={ids[0]}") != fetcher.version(uri)
    assert outcome(fetcher.fetch(f"{uri}?versionId=0"))[0] in (Reason.NOT_FOUND, Reason.FETCH_FAILED)


def test_object_version_is_its_etag_with_and_without_reading(s3: S3Server, fetcher: Fetcher) -> None:
    uri = put(s3, "a.jpg", b"pixels")
    before = fetcher.version(uri)
    assert before is not None
    assert before.startswith("etag:")
    assert fetcher.fetch(uri).version == before
    put(s3, "a.jpg", b"others")
    assert fetcher.version(uri) not in (None, before)
    assert fetcher.version(uri + ".gone") is None


def test_scheme_is_case_insensitive(s3: S3Server, fetcher: Fetcher) -> None:
    uri = put(s3, "a.jpg", b"pixels")
    assert fetcher.fetch("S3" + uri[2:]).data == b"pixels"


def test_endpoint_is_read_from_the_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put(s3, "a.jpg", b"pixels")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    # An unrelated option creates a separate filesystem, which uses this environment.
    fetcher = Fetcher(FetchPolicy(storage_options={"default_block_size": 1 << 20}))
    assert fetcher.fetch(uri).data == b"pixels"


def test_missing_objects_and_buckets_are_not_retried(s3: S3Server, fetcher: Fetcher) -> None:
    missing = fetcher.fetch(f"s3://{s3.bucket}/none.jpg")
    assert outcome(missing) == (Reason.NOT_FOUND, "HTTP 404 NoSuchKey", 1)
    missing = fetcher.fetch("s3://no-such-bucket-here/none.jpg")
    assert outcome(missing) == (Reason.NOT_FOUND, "HTTP 404 NoSuchBucket", 1)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"key": "WRONGKEY", "secret": SECRET}, "InvalidAccessKeyId"),
        ({"secret": SECRET}, "SignatureDoesNotMatch"),
        ({"anon": True}, "AccessDenied"),
    ],
)
def test_wrong_credentials_are_not_retried_and_not_shown(
    s3: S3Server, options: dict[str, object], code: str
) -> None:
    uri = put(s3, "a.jpg", b"pixels")
    if options.get("secret") and not options.get("key"):
        options = {**options, "key": s3.environment["AWS_ACCESS_KEY_ID"]}
    fetcher = Fetcher(FetchPolicy(storage_options={"endpoint_url": s3.endpoint_url, **options}))
    fetched = fetcher.fetch(uri)
    assert outcome(fetched) == (Reason.ACCESS_DENIED, f"HTTP 403 {code}", 1)
    shown = f"{fetched!r} {fetcher!r} {fetched!s} {fetcher!s}"
    assert SECRET not in shown
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in shown
    assert s3.environment["AWS_ACCESS_KEY_ID"] not in shown


def test_invalid_bucket_name_is_not_found(fetcher: Fetcher) -> None:
    for uri in ("s3://A Bucket/a.jpg", "s3://bucket", "s3:///a.jpg", "s3://bucket/"):
        assert outcome(fetcher.fetch(uri))[::2] == (Reason.NOT_FOUND, 1), uri


def test_too_large_object_is_rejected_before_its_body_is_read(s3: S3Server) -> None:
    uri = put(s3, "large.jpg", b"x" * 20_000_000)
    options = {"endpoint_url": s3.endpoint_url}
    fetched = Fetcher(FetchPolicy(max_bytes=19_999_999, storage_options=options)).fetch(uri)
    assert outcome(fetched) == (Reason.TOO_LARGE, "20000000 bytes, the limit is 19999999", 1)
    assert fetched.n_bytes == 20_000_000
    assert (
        Fetcher(FetchPolicy(max_bytes=20_000_000, storage_options=options)).fetch(uri).n_bytes == 20_000_000
    )


def test_object_is_fetched_with_a_single_request(s3: S3Server) -> None:
    """A proxy counts the requests to the server."""
    uri = put(s3, "a.jpg", b"x" * 100_000)
    with CountingProxy(s3.endpoint_url) as proxy:
        fetcher = Fetcher(FetchPolicy(storage_options={"endpoint_url": proxy.endpoint_url}))
        assert fetcher.fetch(uri).n_bytes == 100_000
        assert proxy.requests() == ["GET"]


def test_unreachable_server_is_tried_max_attempts_times(s3: S3Server) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        options = {"endpoint_url": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        pauses: list[float] = []
        fetcher = Fetcher(FetchPolicy(max_attempts=3, storage_options=options), pause=pauses.append)
        fetched = fetcher.fetch("s3://bucket/a.jpg")
    assert outcome(fetched) == (Reason.FETCH_FAILED, "EndpointConnectionError", 3)
    assert len(pauses) == 2


@contextmanager
def misbehaving(status: int, headers: dict[str, str], body: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that sends the same response to all requests; yields its endpoint and the list of requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(503, "SlowDown", Reason.THROTTLED), (500, "InternalError", Reason.FETCH_FAILED)],
)
def test_every_request_to_an_overloaded_store_is_counted(status: int, code: str, reason: Reason) -> None:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    headers = {"Content-Length": str(len(body)), "Retry-After": "7"}
    pauses: list[float] = []
    with misbehaving(status, headers, body) as (endpoint, requests):
        policy = FetchPolicy(max_attempts=3, storage_options={"endpoint_url": endpoint})
        fetched = Fetcher(policy, pause=pauses.append).fetch("s3://bucket/a.jpg")
    assert outcome(fetched) == (reason, f"HTTP {status} {code}", 3)
    assert len(requests) == 3
    assert [7.0 <= pause <= 8.0 for pause in pauses] == [True, True]


@pytest.mark.usefixtures("s3")
def test_incomplete_object_is_retried_and_discarded() -> None:
    with misbehaving(200, {"Content-Length": "1000"}, b"x" * 100) as (endpoint, requests):
        policy = FetchPolicy(max_attempts=2, storage_options={"endpoint_url": endpoint})
        fetched = Fetcher(policy, pause=lambda seconds: None).fetch("s3://bucket/a.jpg")
    assert outcome(fetched)[::2] == (Reason.FETCH_FAILED, 2)
    assert len(requests) == 2


def test_unresponsive_server_times_out(s3: S3Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {"endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        policy = FetchPolicy(timeout_seconds=0.3, max_attempts=2, storage_options=options)
        started = time.monotonic()
        fetched = Fetcher(policy, pause=lambda seconds: None).fetch("s3://bucket/a.jpg")
    assert outcome(fetched)[::2] == (Reason.TIMEOUT, 2)
    assert time.monotonic() - started < 5.0


def test_concurrent_threads_share_one_filesystem(s3: S3Server, fetcher: Fetcher) -> None:
    bodies = {
        put(s3, f"many/{number}.jpg", bytes([number]) * 50_000): bytes([number]) for number in range(64)
    }
    start = threading.Barrier(64)

    def fetch(uri: str) -> bytes | None:
        start.wait()
        return fetcher.fetch(uri).data

    before = set(map(id, s3fs.S3FileSystem._cache.values()))
    with ThreadPoolExecutor(64) as pool:
        data = dict(zip(bodies, pool.map(fetch, bodies), strict=True))
    assert data == {uri: body * 50_000 for uri, body in bodies.items()}
    assert set(map(id, s3fs.S3FileSystem._cache.values())) == before


class CountingProxy:
    """Forwards bytes to the S3 server and records the method of each request."""

    def __init__(self, endpoint_url: str) -> None:
        host, port = endpoint_url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sent: list[bytes] = []

    def __enter__(self) -> CountingProxy:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()

    def requests(self) -> list[str]:
        """Methods of the requests so far, in order."""
        lines = b"".join(self._sent).split(b"\r\n")
        return [line.split(b" ")[0].decode() for line in lines if line.endswith(b"HTTP/1.1")]

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        upstream = socket.create_connection(self._target)
        threading.Thread(target=self._copy, args=(upstream, client, []), daemon=True).start()
        self._copy(client, upstream, self._sent)

    def _copy(self, source: socket.socket, target: socket.socket, requests: list[bytes]) -> None:
        while data := source.recv(1 << 16):
            requests.append(data)
            target.sendall(data)
