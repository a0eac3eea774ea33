"""Fetching from a real HTTP server that misbehaves in many ways."""

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from batchcls import __version__
from batchcls.images.fetch import Fetched, Fetcher, FetchPolicy
from batchcls.images.url_policy import AddressPolicy
from batchcls.schema import Reason

BODY = b"pixels" * 1000


@dataclass
class Server:
    """The running server: its URL, its requests, and the event that releases stalled responses."""

    port: int
    requests: Counter[str] = field(default_factory=Counter)
    headers: dict[str, str] = field(default_factory=dict)
    release: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    """One method for each kind of behavior, selected by the first segment of the path."""

    protocol_version = "HTTP/1.1"
    state: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.state.requests[path] += 1
        self.state.headers = {name.lower(): value for name, value in self.headers.items()}
        name, _, argument = path.removeprefix("/").partition("/")
        # A client that times out closes the connection during the response.
        with contextlib.suppress(ConnectionError):
            getattr(self, name)(argument)

    def respond(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def status(self, argument: str) -> None:
        self.respond(int(argument), b"a human-readable error", Set_Cookie="id=1; Path=/")

    def image(self, argument: str) -> None:
        self.respond(200, BODY)

    def empty(self, argument: str) -> None:
        self.respond(200)

    def flaky(self, argument: str) -> None:
        statuses = [int(status) for status in argument.split("-")]
        count = self.state.requests[self.path]
        status = statuses[min(count, len(statuses)) - 1]
        self.respond(status, BODY if status == 200 else b"", Retry_After="7")

    def redirect(self, argument: str) -> None:
        target = {
            "image": "/image",
            "loop": "/redirect/loop",
            "metadata": "http://169.254.169.254/latest/meta-data/",
            "file": "file:///etc/passwd",
            "s3": "s3://bucket/key",
            "nowhere": "",
            "broken": "http://[::1/x",
            "localhost": self.state.url("/image", "localhost"),
            "loopback": self.state.url("/image", "127.0.0.2"),
            "decimal": self.state.url("/image", "2130706433"),
        }[argument]
        self.respond(302, Location=target)

    def short(self, argument: str) -> None:
        self.respond(200, BODY[:100], Content_Length=str(len(BODY)))
        self.close_connection = True

    def liar(self, argument: str) -> None:
        self.respond(200, b"x", Content_Length=str(10**12))
        self.close_connection = True

    def reset(self, argument: str) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def stall(self, argument: str) -> None:
        if argument == "body":
            self.respond(200, BODY[:100], Content_Length=str(len(BODY)))
            self.wfile.flush()
        self.state.release.wait()
        self.close_connection = True

    def endless(self, argument: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

    def gzip(self, argument: str) -> None:
        self.respond(200, BODY, Content_Encoding="gzip")

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """One thread per connection; broken connections are part of the tests."""

    request_queue_size = 256

    def handle_error(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    httpd = QuietServer(("127.0.0.1", 0), Handler)
    state = Handler.state = Server(httpd.server_address[1])
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.release.set()
        httpd.shutdown()
        thread.join()
        httpd.socket.close()


Fetch = Callable[..., Fetched]
"""A URL and settings of FetchPolicy -> what came, without living the pauses."""


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def fetch(pauses: list[float]) -> Fetch:
    def fetch(uri: str, **settings: object) -> Fetched:
        settings.setdefault("addresses", AddressPolicy(allow_private_addresses=True))
        return Fetcher(FetchPolicy(**settings), pause=pauses.append).fetch(uri)  # type: ignore[arg-type]

    return fetch


def outcome(fetched: Fetched) -> tuple[Reason | None, int]:
    assert (fetched.data is None) != (fetched.failure is None)
    return (fetched.failure.reason if fetched.failure else None), fetched.attempts


def test_complete_image_is_fetched_with_a_user_agent(server: Server, fetch: Fetch) -> None:
    assert fetch(server.url("/image")) == Fetched(BODY, None, 1, len(BODY))
    assert server.headers["user-agent"] == f"batchcls/{__version__}"
    assert fetch(server.url("/empty")) == Fetched(b"", None, 1, 0)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, Reason.ACCESS_DENIED),
        (403, Reason.ACCESS_DENIED),
        (404, Reason.NOT_FOUND),
        (410, Reason.NOT_FOUND),
        (418, Reason.FETCH_FAILED),
    ],
)
def test_permanent_status_is_not_retried(server: Server, fetch: Fetch, status: int, reason: Reason) -> None:
    fetched = fetch(server.url(f"/status/{status}?token=secret"))
    assert outcome(fetched) == (reason, 1)
    assert fetched.failure is not None
    assert fetched.failure.detail == f"HTTP {status}"
    assert server.requests[f"/status/{status}"] == 1


def test_image_is_fetched_after_the_server_recovers(server: Server, fetch: Fetch) -> None:
    fetched = fetch(server.url("/flaky/500-502-200"))
    assert (fetched.data, fetched.attempts) == (BODY, 3)


@pytest.mark.parametrize(
    ("status", "reason"), [(503, Reason.THROTTLED), (429, Reason.THROTTLED), (504, Reason.TIMEOUT)]
)
def test_retry_after_is_honored_up_to_the_maximum_attempts(
    server: Server, fetch: Fetch, pauses: list[float], status: int, reason: Reason
) -> None:
    assert outcome(fetch(server.url(f"/flaky/{status}"), max_attempts=3)) == (reason, 3)
    assert server.requests[f"/flaky/{status}"] == 3
    assert all(7.0 <= pause <= 8.0 for pause in pauses)
    assert len(pauses) == 2


@pytest.mark.parametrize("where", ["head", "body"])
def test_stalled_server_times_out(server: Server, fetch: Fetch, where: str) -> None:
    fetched = fetch(server.url(f"/stall/{where}"), timeout_seconds=0.2, max_attempts=2)
    assert outcome(fetched) == (Reason.TIMEOUT, 2)


@pytest.mark.parametrize("path", ["/reset", "/short"])
def test_lost_connection_is_retried_and_partial_data_is_discarded(
    server: Server, fetch: Fetch, path: str
) -> None:
    assert outcome(fetch(server.url(path), max_attempts=3)) == (Reason.FETCH_FAILED, 3)
    # aiohttp itself retries once if the connection is lost before the response.
    assert server.requests[path] in (3, 6)


def test_refused_connection_is_retried(fetch: Fetch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.jpg"
        assert outcome(fetch(url, max_attempts=2)) == (Reason.FETCH_FAILED, 2)


def test_too_large_content_length_is_rejected(server: Server, fetch: Fetch) -> None:
    fetched = fetch(server.url("/liar"))
    assert outcome(fetched) == (Reason.TOO_LARGE, 1)
    assert fetched.n_bytes == 10**12


def test_too_large_body_is_rejected_while_reading(server: Server, fetch: Fetch) -> None:
    assert outcome(fetch(server.url("/endless"), max_bytes=300_000)) == (Reason.TOO_LARGE, 1)
    assert fetch(server.url("/image"), max_bytes=len(BODY)).data == BODY
    assert outcome(fetch(server.url("/image"), max_bytes=len(BODY) - 1)) == (Reason.TOO_LARGE, 1)


def test_compressed_bodies_are_neither_requested_nor_accepted(server: Server, fetch: Fetch) -> None:
    assert outcome(fetch(server.url("/gzip"))) == (Reason.FETCH_FAILED, 1)
    assert server.headers["accept-encoding"] == "identity"


def test_redirects_are_followed_without_cookies(server: Server) -> None:
    fetcher = Fetcher(FetchPolicy(addresses=AddressPolicy(allow_private_addresses=True)))
    fetcher.fetch(server.url("/status/404"))
    assert fetcher.fetch(server.url("/redirect/image")).data == BODY
    assert "cookie" not in server.headers
    assert fetcher.fetch(server.url("/redirect/localhost")).data == BODY


@pytest.mark.parametrize("target", ["file", "s3", "broken"])
def test_redirects_to_other_schemes_are_forbidden(server: Server, fetch: Fetch, target: str) -> None:
    assert outcome(fetch(server.url(f"/redirect/{target}"))) == (Reason.FORBIDDEN_URI, 1)


def test_endless_redirects_and_missing_locations_fail(server: Server, fetch: Fetch) -> None:
    assert outcome(fetch(server.url("/redirect/loop"))) == (Reason.FETCH_FAILED, 1)
    assert server.requests["/redirect/loop"] == 6
    assert outcome(fetch(server.url("/redirect/nowhere"))) == (Reason.FETCH_FAILED, 1)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]"]
)
def test_local_hosts_are_forbidden_in_any_spelling(server: Server, fetch: Fetch, host: str) -> None:
    fetched = fetch(server.url("/image?token=secret", host), addresses=AddressPolicy())
    assert outcome(fetched) == (Reason.FORBIDDEN_URI, 1)
    assert "secret" not in repr(fetched)
    assert not server.requests


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://10.0.0.1/a",
        "http://[fe80::1]/a",
        "http:///a",
        "http://[::1/a",
    ],
)
def test_private_and_invalid_addresses_are_forbidden_without_a_connection(fetch: Fetch, url: str) -> None:
    assert outcome(fetch(url, addresses=AddressPolicy(), timeout_seconds=5.0)) == (Reason.FORBIDDEN_URI, 1)


class PublicHostIsLoopback(AddressPolicy):
    """Treats 127.0.0.1, the address of the test server, as public; checks all other addresses."""

    def check_ip(self, text: str) -> None:
        if text != "127.0.0.1":
            super().check_ip(text)


@pytest.mark.parametrize("target", ["metadata", "loopback", "decimal"])
def test_each_redirect_target_is_checked(server: Server, fetch: Fetch, target: str) -> None:
    fetched = fetch(server.url(f"/redirect/{target}"), addresses=PublicHostIsLoopback(), timeout_seconds=5.0)
    assert outcome(fetched) == (Reason.FORBIDDEN_URI, 1)
    assert server.requests == {f"/redirect/{target}": 1}
    assert fetch(server.url("/redirect/image"), addresses=PublicHostIsLoopback()).data == BODY


def test_credentials_in_a_url_reach_only_the_server(server: Server, fetch: Fetch) -> None:
    fetched = fetch(f"http://ada:password@127.0.0.1:{server.port}/status/403?signature=secret")
    assert server.headers["authorization"].startswith("Basic ")
    assert "password" not in repr(fetched)
    assert "secret" not in repr(fetched)


def test_fetcher_serves_concurrent_threads(server: Server) -> None:
    fetcher = Fetcher(FetchPolicy(addresses=AddressPolicy(allow_private_addresses=True)))
    with ThreadPoolExecutor(64) as pool:
        fetched = list(pool.map(fetcher.fetch, [server.url(f"/image/{number}") for number in range(256)]))
    assert all(one.data == BODY for one in fetched)
    assert sum(server.requests.values()) == 256
