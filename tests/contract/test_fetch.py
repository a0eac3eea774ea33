"""Fetching local files and other fsspec schemes."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from batchcls.errors import InputError
from batchcls.images.fetch import Fetched, Fetcher, FetchPolicy
from batchcls.images.retry import Backoff
from batchcls.images.url_policy import AddressPolicy
from batchcls.schema import Failure, Reason


def failure(fetched: Fetched) -> tuple[Reason, str, int]:
    assert fetched.data is None
    assert isinstance(fetched.failure, Failure)
    return fetched.failure.reason, fetched.failure.detail, fetched.attempts


def test_a_file_is_read_by_path_and_by_file_uri(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"pixels")
    fetcher = Fetcher(FetchPolicy())
    for uri in (f"{tmp_path}/a b.jpg", f"file://{tmp_path}/a%20b.jpg"):
        assert fetcher.fetch(uri) == Fetched(b"pixels", None, 1, 6)


def test_empty_file_is_returned_as_data(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert Fetcher(FetchPolicy()).fetch(f"{tmp_path}/a.jpg") == Fetched(b"", None, 1, 0)


def test_size_limit_is_inclusive_and_larger_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(b"x" * 100)
    with (tmp_path / "huge").open("wb") as sparse:
        sparse.truncate(10**12)
    fetcher = Fetcher(FetchPolicy(max_bytes=100))
    assert fetcher.fetch(f"{tmp_path}/fits").n_bytes == 100
    huge = fetcher.fetch(f"{tmp_path}/huge")
    assert failure(huge) == (Reason.TOO_LARGE, "1000000000000 bytes, the limit is 100", 1)
    assert huge.n_bytes == 10**12


def test_limit_applies_to_files_that_report_a_wrong_size() -> None:
    endless = Fetcher(FetchPolicy(max_bytes=10)).fetch("/proc/self/environ")
    assert failure(endless)[0] is Reason.TOO_LARGE


def test_missing_file_is_not_retried(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fetcher = Fetcher(FetchPolicy())
    for path in ("none.jpg", "file/below.jpg"):
        assert failure(fetcher.fetch(f"{tmp_path}/{path}"))[::2] == (Reason.NOT_FOUND, 1)


def test_special_files_are_rejected_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        fetcher = Fetcher(FetchPolicy())
        for path in (tmp_path / "fifo", tmp_path / "socket", tmp_path, "/dev/zero"):
            assert failure(fetcher.fetch(str(path)))[::2] == (Reason.FORBIDDEN_URI, 1)


def test_paths_outside_the_allowed_roots_are_rejected_in_any_spelling(tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "a.jpg").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"secret")
    (allowed / "link.jpg").symlink_to(tmp_path / "secret")
    fetcher = Fetcher(FetchPolicy(addresses=AddressPolicy(allowed_roots=(str(allowed),))))
    assert fetcher.fetch(f"{allowed}/a.jpg").data == b"a"
    for uri in (
        f"{allowed}/../secret",
        f"file://{allowed}/%2e%2e/secret",
        f"file://localhost{allowed}/..%2Fsecret",
        f"local://{tmp_path}/secret",
        f"{allowed}/link.jpg",
        f"{tmp_path}/secret",
        f"{allowed}/a.jpg\0",
        f"file://{allowed}/a.jpg%00",
        "file://fileserver/share/a.jpg",
    ):
        assert failure(fetcher.fetch(uri))[::2] == (Reason.FORBIDDEN_URI, 1), uri


def test_chained_filesystems_are_not_supported(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    fetcher = Fetcher(FetchPolicy())
    for uri in (
        f"filecache::file://{tmp_path}/secret",
        f"simplecache::file://{tmp_path}/secret",
        f"zip://a::file://{tmp_path}/secret",
        f"asynclocal://{tmp_path}/secret",
        f"dir://{tmp_path}/secret",
        "simplecache::http://169.254.169.254/latest",
    ):
        assert failure(fetcher.fetch(uri))[::2] == (Reason.UNSUPPORTED_SCHEME, 1), uri


def test_hosts_that_cannot_be_checked_are_rejected() -> None:
    for uri in ("ftp://10.0.0.1/a.jpg", "sftp://10.0.0.1/a.jpg", "webhdfs://10.0.0.1/a.jpg"):
        assert failure(Fetcher(FetchPolicy()).fetch(uri))[::2] == (Reason.FORBIDDEN_URI, 1)


def test_unknown_scheme_is_unsupported_and_does_not_leak_the_uri() -> None:
    reason, detail, attempts = failure(Fetcher(FetchPolicy()).fetch("nosuch://ada:password@host/a?token=t"))
    assert (reason, attempts) == (Reason.UNSUPPORTED_SCHEME, 1)
    assert "password" not in detail
    assert "token" not in detail


def test_other_fsspec_schemes_are_read_up_to_the_limit() -> None:
    fsspec.filesystem("memory").pipe("/test-fetch/a.jpg", b"x" * 100)
    assert Fetcher(FetchPolicy()).fetch("memory://test-fetch/a.jpg") == Fetched(b"x" * 100, None, 1, 100)
    small = Fetcher(FetchPolicy(max_bytes=99))
    assert failure(small.fetch("memory://test-fetch/a.jpg"))[0] is Reason.TOO_LARGE
    assert failure(small.fetch("memory://test-fetch/none.jpg"))[0] is Reason.NOT_FOUND


class Unready(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A filesystem for tests that fails as configured and counts its calls."""

    protocol = "unready"
    failures: tuple[BaseException, ...] = ()
    opened = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: object) -> object:
        kind = type(self)
        kind.opened += 1
        if kind.opened <= len(kind.failures):
            raise kind.failures[kind.opened - 1]
        return Path(__file__).open("rb")


@pytest.fixture
def unready() -> type[Unready]:
    fsspec.register_implementation("unready", Unready, clobber=True)
    Unready.opened = 0
    return Unready


def test_attempts_are_limited_counted_and_delayed(unready: type[Unready]) -> None:
    unready.failures = (ConnectionResetError("secret"),) * 9
    pauses: list[float] = []
    backoff = Backoff(base_seconds=1.0, ceiling_seconds=2.0)
    fetched = Fetcher(FetchPolicy(max_attempts=4), backoff, pauses.append).fetch("unready://a")
    assert failure(fetched) == (Reason.FETCH_FAILED, "ConnectionResetError", 4)
    assert unready.opened == 4
    assert [pause <= ceiling for pause, ceiling in zip(pauses, (1.0, 2.0, 2.0), strict=True)] == [True] * 3


def test_successful_attempt_ends_the_retries(unready: type[Unready]) -> None:
    unready.failures = (TimeoutError(), ConnectionResetError())
    fetched = Fetcher(FetchPolicy(), pause=lambda seconds: None).fetch("unready://a")
    assert fetched == Fetched(Path(__file__).read_bytes(), None, 3, Path(__file__).stat().st_size)


def test_programming_error_is_a_failed_row_and_is_not_retried(
    unready: type[Unready],
) -> None:
    unready.failures = (ZeroDivisionError("secret"),)
    assert failure(Fetcher(FetchPolicy()).fetch("unready://a")) == (
        Reason.FETCH_FAILED,
        "ZeroDivisionError",
        1,
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_not_failed_rows(unready: type[Unready], stop: type[BaseException]) -> None:
    unready.failures = (stop(),)
    with pytest.raises(stop):
        Fetcher(FetchPolicy()).fetch("unready://a")


def test_fetcher_is_thread_safe(tmp_path: Path) -> None:
    for number in range(64):
        (tmp_path / str(number)).write_bytes(str(number).encode() * 1000)
    fetcher, start = Fetcher(FetchPolicy()), threading.Barrier(64)

    def fetch(number: int) -> bytes | None:
        start.wait()
        return fetcher.fetch(f"{tmp_path}/{number}").data

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(fetch, range(64))) == [str(number).encode() * 1000 for number in range(64)]


@pytest.mark.parametrize("name", ["timeout_seconds", "max_bytes", "max_attempts"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be more than 0, not 0"):
        FetchPolicy(**{name: 0})


def test_repr_contains_no_credentials() -> None:
    policy = FetchPolicy(storage_options={"secret": "SECRET", "endpoint_url": "http://store"})
    assert "SECRET" not in repr(policy)
    assert "SECRET" not in repr(Fetcher(policy))
    assert "http://store" in repr(Fetcher(policy))


def test_file_version_is_the_same_with_and_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"pixels")
    os.utime(path, ns=(5, 1_700_000_000_123_456_789))
    fetcher = Fetcher(FetchPolicy())
    assert fetcher.version(str(path)) == fetcher.fetch(str(path)).version == "stat:6:1700000000123456789"
    assert fetcher.version(str(tmp_path / "gone.jpg")) is None
    assert fetcher.version("https://example.com/a.jpg") is None
    confined = Fetcher(FetchPolicy(addresses=AddressPolicy((str(tmp_path / "other"),))))
    assert confined.version(str(path)) is None
