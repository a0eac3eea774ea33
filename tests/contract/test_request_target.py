"""The server receives the URL of an http(s) image exactly as in the manifest, byte for byte."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import botocore.session
import pytest
from botocore.config import Config

from batchcls.images.fetch import Fetched, Fetcher, FetchPolicy
from batchcls.images.url_policy import AddressPolicy
from batchcls.schema import Reason
from tests.conftest import S3Server


@dataclass
class Recorder:
    """A server that records the raw head of each request and responds with an image or a redirect.

    `locations` are the values of the Location headers to send, in order. All later requests receive a body of one
    byte.
    """

    listener: socket.socket
    heads: list[bytes] = field(default_factory=list)
    locations: list[bytes] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def targets(self) -> list[str]:
        """The request targets as received."""
        return [head.split(b"\r\n", 1)[0].split(b" ")[1].decode("ascii") for head in self.heads]

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionError):
                self._respond(connection)

    def _respond(self, connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = connection.recv(65536)
            if not piece:
                return
            head += piece
        self.heads.append(head)
        if self.locations:
            response = b"HTTP/1.1 302 Found\r\nLocation: " + self.locations.pop(0) + b"\r\nContent-Length: 0"
            connection.sendall(response + b"\r\nConnection: close\r\n\r\n")
        else:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        recorder = Recorder(listener)
        thread = threading.Thread(target=recorder.serve)
        thread.start()
        try:
            yield recorder
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def fetcher() -> Fetcher:
    policy = FetchPolicy(addresses=AddressPolicy(allow_private_addresses=True), max_attempts=1)
    return Fetcher(policy, pause=lambda seconds: None)


def failed(fetched: Fetched) -> Reason:
    assert fetched.failure is not None
    return fetched.failure.reason


@pytest.mark.parametrize(
    "target",
    [
        "/a%2Fb.jpg",
        "/a%2fb.jpg",
        "/user%40example.com/%7Ename/%41.jpg",
        "/a/../b/./c.jpg",
        "/../../a.jpg",
        "/a/%2e%2e/b.jpg",
        "//a///b.jpg",
        "/a+b%2Bc%20d.jpg",
        "/a;v=1,2/b:c@d&e=f$g!h'(i)*.jpg",
        "/a[1].jpg",
        "/%E4%BD%A0%FF.jpg",
        "/a.jpg?b=1&a=2&b=0",
        "/a.jpg?X-Amz-Credential=AK%2F20260101%2Fus-east-1%2Fs3%2Faws4_request&X-Amz-Signature=0f",
        "/a.jpg?a=1+1&b=2%2B2&c=;d&e&f=&=g&&h==%3D",
        "/a.jpg?url=http://other/%2F?x@y:z&path=../../c/./d",
        "/a.jpg?x[]=1&y=%7B%7D",
        "/",
    ],
)
def test_url_is_sent_verbatim(recorder: Recorder, fetcher: Fetcher, target: str):
    assert fetcher.fetch(f"http://127.0.0.1:{recorder.port}{target}").data == b"x"
    assert recorder.targets == [target]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("/a b.jpg", "/a%20b.jpg"),
        ("/ä/你.jpg?q=ü", "/%C3%A4/%E4%BD%A0.jpg?q=%C3%BC"),
        ('/"<>\\^`{|}.jpg', "/%22%3C%3E%5C%5E%60%7B%7C%7D.jpg"),
        ("/100%.jpg?a=%zz&b=%4", "/100%25.jpg?a=%25zz&b=%254"),
        ("/a\tb\x7fc\x00.jpg", "/a%09b%7Fc%00.jpg"),
        ("/a\r\nX-Header: b", "/a%0D%0AX-Header:%20b"),
        ("/a.jpg\r\n", "/a.jpg"),
        ("/a.jpg?b=1#fragment?c", "/a.jpg?b=1"),
        ("/a.jpg#/../%2F", "/a.jpg"),
        ("", "/"),
        ("\n", "/"),
        ("?a=%2F", "/?a=%2F"),
    ],
)
def test_only_invalid_characters_are_quoted(recorder: Recorder, fetcher: Fetcher, written: str, sent: str):
    assert fetcher.fetch(f"http://127.0.0.1:{recorder.port}{written}").data == b"x"
    assert recorder.targets == [sent]
    assert b"\r\nX-Header" not in recorder.heads[0]


def test_host_header_contains_host_and_non_default_port(recorder: Recorder, fetcher: Fetcher):
    assert fetcher.fetch(f"HTTP://LocalHost:{recorder.port}/A%2fb").data == b"x"
    assert f"\r\nHost: localhost:{recorder.port}\r\n".encode() in recorder.heads[0]


def test_user_in_the_url_becomes_an_authorization_header(recorder: Recorder, fetcher: Fetcher):
    assert fetcher.fetch(f"http://ada:p%40ss@127.0.0.1:{recorder.port}/a%2Fb?c=%40").data == b"x"
    assert recorder.targets == ["/a%2Fb?c=%40"]
    assert b"\r\nAuthorization: Basic YWRhOnBAc3M=\r\n" in recorder.heads[0]
    assert f"\r\nHost: 127.0.0.1:{recorder.port}\r\n".encode() in recorder.heads[0]


@pytest.mark.parametrize(
    "url",
    [
        *("http:///a", "http://?a", "http://#a", "http://[::1/a", "http://h:99999/a"),
        *("http://good\\@127.0.0.1/a", "http://a b/c", "http://h:port/a", "http://:80/a"),
    ],
)
def test_url_without_a_valid_host_is_forbidden(fetcher: Fetcher, url: str):
    assert failed(fetcher.fetch(url)) is Reason.FORBIDDEN_URI


@pytest.mark.parametrize(
    ("location", "sent"),
    [
        (b"/b%2Fc/%40d?e=%2F&f=+;g", "/b%2Fc/%40d?e=%2F&f=+;g"),
        (b"c%2Fd.jpg?s=%2f", "/x%2Fy/c%2Fd.jpg?s=%2f"),
        (b"../c%2fd//e", "/c%2fd//e"),
        (b"./../../../c", "/c"),
        (b"c/./d/../e/", "/x%2Fy/c/e/"),
        (b"?b=%2F", "/x%2Fy/z%40.jpg?b=%2F"),
        (b"#fragment", "/x%2Fy/z%40.jpg?a=%2F"),
        (b"/a b?c=%zz", "/a%20b?c=%25zz"),
        ("/ä".encode(), "/%C3%A4"),
        (b"/\xe4", "/%E4"),
    ],
)
def test_relative_redirect_is_resolved_without_rewriting(
    recorder: Recorder, fetcher: Fetcher, location: bytes, sent: str
):
    recorder.locations = [location]
    assert fetcher.fetch(f"http://127.0.0.1:{recorder.port}/x%2Fy/z%40.jpg?a=%2F").data == b"x"
    assert recorder.targets == ["/x%2Fy/z%40.jpg?a=%2F", sent]


@pytest.mark.parametrize("start", ["http://127.0.0.1:{}", "//127.0.0.1:{}", "HTTP://127.0.0.1:{}"])
@pytest.mark.parametrize("target", ["/a/../b//%2e%2E/%2F%7e?c=%2F;+&d", "/", "/a?b=http://c/../d"])
def test_absolute_redirect_is_followed_verbatim(
    recorder: Recorder, fetcher: Fetcher, start: str, target: str
):
    recorder.locations = [(start.format(recorder.port) + target).encode()]
    assert fetcher.fetch(f"http://127.0.0.1:{recorder.port}/x").data == b"x"
    assert recorder.targets == ["/x", target]


@pytest.mark.parametrize(
    "location",
    [
        b"ftp://127.0.0.1/a",
        b"file:///a",
        b"s3://b/k",
        b"data:image/png,x",
        b"http:/a",
        b"http://[::1/",
        b"//",
    ],
)
def test_redirect_to_another_scheme_is_forbidden(recorder: Recorder, fetcher: Fetcher, location: bytes):
    recorder.locations = [location]
    assert failed(fetcher.fetch(f"http://127.0.0.1:{recorder.port}/x")) is Reason.FORBIDDEN_URI
    assert len(recorder.heads) == 1


_KEYS = [
    *("plain.jpg", "a b/c+d.jpg", "user@example.com/~name.jpg", "a%2Fb.jpg", "a%b.jpg", "100%25.jpg"),
    *(
        "ä/你好/é.jpg",
        "a//b///c.jpg",
        "a/../b.jpg",
        "../c.jpg",
        "./d.jpg",
        "e/./f.jpg",
        "a;b=c,d&e=f?g=h#i.jpg",
    ),
    *('[1]{2}|^`"<>\\.jpg', "q'(w)*!$:=.jpg", "/leading.jpg", "folder/"),
]


@pytest.mark.parametrize("key", _KEYS)
def test_presigned_urls_of_any_key_are_accepted_by_the_store(s3: S3Server, fetcher: Fetcher, key: str):
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=s3.endpoint_url,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    body = key.encode()
    client.put_object(Bucket=s3.bucket, Key=key, Body=body)
    url = client.generate_presigned_url("get_object", Params={"Bucket": s3.bucket, "Key": key})
    assert fetcher.fetch(url).data == body, url
