"""What a manifest may make the program read."""

from pathlib import Path

import pytest

from batchcls.errors import InputError
from batchcls.images.addresses import AddressPolicy, ForbiddenAddressError, is_public, resolve_uri
from batchcls.uris import is_remote, join, local_path, redact_options, redact_uri, scheme


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
def test_an_address_that_is_not_on_the_open_internet_is_refused(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(ForbiddenAddressError):
        AddressPolicy().check_ip(address)
    AddressPolicy(allow_private_addresses=True).check_ip(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.15.255.255", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_an_address_of_the_open_internet_is_allowed(address: str) -> None:
    assert is_public(address)
    AddressPolicy().check_ip(address)


def test_a_path_is_confined_after_dots_and_links_are_resolved(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    allowed.mkdir()
    outside.mkdir()
    (allowed / "a.jpg").touch()
    (outside / "secret").touch()
    (allowed / "link").symlink_to(outside / "secret")
    (allowed / "folder").symlink_to(outside)
    (tmp_path / "allowed-too").mkdir()
    policy = AddressPolicy(allow_roots=(str(allowed),))
    assert policy.check_path(f"{allowed}/x/../a.jpg") == allowed / "a.jpg"
    for path in ("../outside/secret", "link", "folder/secret", "../allowed-too/x", "/etc/passwd"):
        with pytest.raises(ForbiddenAddressError):
            policy.check_path(str(allowed / path))


def test_a_link_among_the_allowed_roots_is_an_allowed_root(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "current").symlink_to(tmp_path / "real")
    policy = AddressPolicy(allow_roots=(str(tmp_path / "current"),))
    assert policy.check_path(f"{tmp_path}/current/a.jpg") == tmp_path / "real" / "a.jpg"


def test_a_null_byte_is_refused_with_and_without_roots(tmp_path: Path) -> None:
    for policy in (AddressPolicy(), AddressPolicy(allow_roots=(str(tmp_path),))):
        with pytest.raises(ForbiddenAddressError):
            policy.check_path(f"{tmp_path}/a.jpg\0.png")


def test_a_scheme_whose_host_cannot_be_checked_needs_the_same_permission_as_private_hosts() -> None:
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
def test_a_relative_uri_is_resolved_against_the_manifests_folder(uri: str, base: str, resolved: str) -> None:
    assert resolve_uri(uri, base) == resolved


def test_schemes_are_told_in_lower_case_and_paths_are_files() -> None:
    spellings = {"/a/b": "file", "a:b": "file", "FILE:///a": "file", "local:///a": "file", "S3://b/k": "s3"}
    assert {uri: scheme(uri) for uri in spellings} == spellings
    assert scheme("filecache::s3://bucket/key") == "filecache"
    assert scheme("odd::name.jpg") == "file"
    assert is_remote("http://host/")
    assert not is_remote("relative/path")


def test_a_file_uri_is_decoded_and_a_path_is_not() -> None:
    assert local_path("file:///a/%2e%2e/b%20c") == "/a/../b c"
    assert local_path("file://localhost/a") == "/a"
    assert local_path("/a/%2e%2e") == "/a/%2e%2e"
    with pytest.raises(InputError, match="host"):
        local_path("file://fileserver/a")


def test_joining_keeps_single_slashes() -> None:
    assert join("s3://bucket/day/", "runs", "r1/") == "s3://bucket/day/runs/r1"
    assert join("/data/", "runs", "r1") == "/data/runs/r1"


def test_a_shown_uri_holds_no_user_password_query_or_fragment() -> None:
    assert redact_uri("https://ada:pa@ss@host:8080/a?X-Amz-Signature=s#f") == "https://host:8080/a"
    assert redact_uri("s3://key:secret@bucket/key") == "s3://bucket/key"
    assert redact_uri("/data/a?b#c@d") == "/data/a?b#c@d"


def test_shown_options_hold_only_values_that_are_known_to_be_harmless() -> None:
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
