"""Which files and hosts a manifest can make the program read."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.images.fetch import Fetcher, FetchPolicy
from batchcls.images.url_policy import AddressPolicy, ForbiddenAddressError, is_public, resolve_uri
from batchcls.storage.uris import is_remote, join, local_path, redact_options, redact_uri, scheme


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *(
            "169.254.169.254",
            "fe80::1",
            "fe80::1%eth0",
            "fd00:ec2::254",
            "fec0::1",
            "100.64.0.1",
            "100.100.100.200",
        ),
        *(
            "224.0.0.1",
            "ff02::1",
            "240.0.0.1",
            "255.255.255.255",
            "192.0.0.192",
            "168.63.129.16",
            "198.18.0.1",
        ),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("64:ff9b:1::1", "2002:7f00:1::", "2001::7f00:1"),
        *("2130706433", "127.1", "0x7f000001", "0177.0.0.1", "localhost", ""),
    ],
)
def test_non_public_addresses_are_rejected(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(ForbiddenAddressError):
        AddressPolicy().check_ip(address)
    AddressPolicy(allow_private_addresses=True).check_ip(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.15.255.255", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_public(address)
    AddressPolicy().check_ip(address)


def read(policy: AddressPolicy, path: Path | str) -> bytes:
    with os.fdopen(policy.open_path(str(path), os.O_RDONLY), "rb") as file:
        return file.read()


def test_paths_are_checked_after_resolving_dots_and_links(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    (allowed / "deep" / "er").mkdir(parents=True)
    outside.mkdir()
    (allowed / "a.jpg").write_bytes(b"a")
    (allowed / "deep" / "er" / "b.jpg").write_bytes(b"b")
    (outside / "secret").touch()
    (allowed / "link").symlink_to(outside / "secret")
    (allowed / "folder").symlink_to(outside)
    (allowed / "loop").symlink_to("loop")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "x").touch()
    policy = AddressPolicy(allowed_roots=(str(allowed),))
    assert read(policy, f"{allowed}/x/../a.jpg") == b"a"
    assert read(policy, f"{allowed}//deep/./er/b.jpg") == b"b"
    for path in ("../outside/secret", "link", "folder/secret", "../allowed-too/x", "/etc/passwd"):
        with pytest.raises(ForbiddenAddressError):
            read(policy, allowed / path)
    with pytest.raises(FileNotFoundError):
        read(policy, allowed / "gone" / "c.jpg")
    with pytest.raises(NotADirectoryError):
        read(policy, allowed / "a.jpg" / "c.jpg")
    for path in ("loop", "loop/a.jpg"):
        with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
            read(policy, allowed / path)


def test_links_within_allowed_roots_are_followed(tmp_path: Path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    for folder in (first / "day", second, other):
        folder.mkdir(parents=True)
    (first / "day" / "a.jpg").write_bytes(b"a")
    (second / "b.jpg").write_bytes(b"b")
    (first / "relative").symlink_to("day/../day/a.jpg")
    (first / "absolute").symlink_to(first / "day")
    (first / "chain").symlink_to("absolute/a.jpg")
    (first / "to-second").symlink_to(second)
    (first / "day" / "up").symlink_to("../../second/b.jpg")
    (other / "way-in").symlink_to(first / "day")
    policy = AddressPolicy(allowed_roots=(str(first), str(second)))
    for path in ("relative", "absolute/a.jpg", "chain"):
        assert read(policy, first / path) == b"a"
    for path in ("to-second/b.jpg", "day/up"):
        assert read(policy, first / path) == b"b"
    assert read(policy, other / "way-in" / "a.jpg") == b"a"


def test_links_files_and_the_root_folder_can_be_allowed_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"a")
    (tmp_path / "current").symlink_to(tmp_path / "real")
    linked = AddressPolicy(allowed_roots=(str(tmp_path / "current"),))
    for path in ("current/a.jpg", "real/a.jpg"):
        assert read(linked, tmp_path / path) == b"a"
        assert read(AddressPolicy(allowed_roots=("/",)), tmp_path / path) == b"a"
        assert (
            read(AddressPolicy(allowed_roots=(str(tmp_path / "current" / "a.jpg"),)), tmp_path / path) == b"a"
        )
    monkeypatch.chdir(tmp_path)
    assert read(AddressPolicy(allowed_roots=("current",)), "real/a.jpg") == b"a"


def test_null_byte_is_rejected_with_and_without_roots(tmp_path: Path) -> None:
    for policy in (AddressPolicy(), AddressPolicy(allowed_roots=(str(tmp_path),))):
        with pytest.raises(ForbiddenAddressError):
            policy.open_path(f"{tmp_path}/a.jpg\0.png", os.O_RDONLY)


_SWAP = """
import os, sys
folder = sys.argv[1]
real, link, day = (os.path.join(folder, name) for name in ("real", "link", "day"))
print("started", flush=True)
while True:
    os.rename(day, real); os.rename(link, day)
    os.rename(day, link); os.rename(real, day)
"""


@pytest.mark.parametrize("name", ["a.jpg", "deep/a.jpg"])
def test_folder_swapped_with_a_link_does_not_escape_the_root(tmp_path: Path, name: str) -> None:
    """A second process repeatedly swaps a folder below the root with a link to the outside."""
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    for folder, content in ((allowed / "day", b"inside"), (outside, b"secret of another size")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
    (allowed / "link").symlink_to(outside)
    fetcher = Fetcher(FetchPolicy(addresses=AddressPolicy((str(allowed),)), max_attempts=1))
    uri = str(allowed / "day" / name)
    expected = fetcher.version(uri)
    with subprocess.Popen([sys.executable, "-c", _SWAP, str(allowed)], stdout=subprocess.PIPE) as swapper:
        try:
            assert swapper.stdout is not None
            assert swapper.stdout.readline() == b"started\n"
            contents = Counter(fetcher.fetch(uri).data for _ in range(1500))
            versions = Counter(fetcher.version(uri) for _ in range(1500))
        finally:
            swapper.kill()
    assert set(contents) <= {b"inside", None}
    assert set(versions) <= {expected, None}
    assert contents[b"inside"] > 0


def test_schemes_with_unchecked_hosts_require_private_addresses() -> None:
    with pytest.raises(ForbiddenAddressError):
        AddressPolicy().check_scheme("sftp")
    AddressPolicy().check_scheme("gs")
    AddressPolicy(allow_private_addresses=True).check_scheme("sftp")


@pytest.mark.parametrize(
    ("uri", "base", "resolved"),
    [
        ("a/b.jpg", "/data/day", "/data/day/a/b.jpg"),
        ("a b%20.jpg", "/data", "/data/a b%20.jpg"),
        ("../b.jpg", "/data/day", "/data/day/../b.jpg"),
        ("/abs/b.jpg", "/data", "/abs/b.jpg"),
        ("file:///abs/b.jpg", "s3://bucket/x", "file:///abs/b.jpg"),
        ("a.jpg", "file:///data/day%201", "/data/day 1/a.jpg"),
        ("a.jpg", "s3://bucket", "s3://bucket/a.jpg"),
        ("./x/a.jpg", "s3://bucket/day/", "s3://bucket/day/x/a.jpg"),
        ("../../../other/a.jpg", "s3://bucket/day", "s3://bucket/other/a.jpg"),
        ("http://host/a.jpg", "s3://bucket/day", "http://host/a.jpg"),
        ("file:/abs/b.jpg", "s3://bucket/x", "file:/abs/b.jpg"),
        ("S3://other/a.jpg", "/data", "S3://other/a.jpg"),
        ("a.jpg", "s3://bucket/a//c", "s3://bucket/a//c/a.jpg"),
        ("a//b.jpg", "s3://bucket/c", "s3://bucket/c/a//b.jpg"),
        ("a.jpg", "s3://bucket//", "s3://bucket//a.jpg"),
        ("../x..jpg", "s3://bucket/a/c", "s3://bucket/a/x..jpg"),
    ],
)
def test_relative_uri_is_resolved_against_the_manifest_folder(uri: str, base: str, resolved: str) -> None:
    assert resolve_uri(uri, base) == resolved


def test_scheme_is_lower_case_and_file_for_paths() -> None:
    spellings = {"/a/b": "file", "a:b": "file", "FILE:///a": "file", "local:///a": "file", "S3://b/k": "s3"}
    assert {uri: scheme(uri) for uri in spellings} == spellings
    assert scheme("filecache::s3://bucket/key") == "filecache"
    assert scheme("odd::name.jpg") == "file"
    assert is_remote("http://host/")
    assert not is_remote("relative/path")


def test_file_uri_is_decoded_but_a_path_is_not() -> None:
    assert local_path("file:///a/%2e%2e/b%20c") == "/a/../b c"
    assert local_path("file://localhost/a") == "/a"
    assert local_path("/a/%2e%2e") == "/a/%2e%2e"
    with pytest.raises(InputError, match="host"):
        local_path("file://fileserver/a")


def test_join_uses_single_slashes() -> None:
    assert join("s3://bucket/day/", "runs", "r1/") == "s3://bucket/day/runs/r1"
    assert join("/data/", "runs", "r1") == "/data/runs/r1"


def test_redacted_uri_has_no_user_password_query_or_fragment() -> None:
    assert redact_uri("https://ada:pa@ss@host:8080/a?X-Amz-Signature=s#f") == "https://host:8080/a"
    assert redact_uri("s3://key:secret@bucket/key") == "s3://bucket/key"
    assert redact_uri("/data/a?b#c@d") == "/data/a?b#c@d"


def test_redacted_options_show_only_harmless_values() -> None:
    options = {
        "endpoint_url": "http://ada:password@store:9000",
        "key": "KEY",
        "brand_new_option": "SECRET",
        "client_kwargs": {"region_name": "eu-west-1", "aws_secret_access_key": "SECRET"},
    }
    assert redact_options(options) == {
        "endpoint_url": "http://store:9000",
        "key": "***",
        "brand_new_option": "***",
        "client_kwargs": {"region_name": "eu-west-1", "aws_secret_access_key": "***"},
    }
