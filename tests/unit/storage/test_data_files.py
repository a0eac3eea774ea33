"""Data files of a path on local disk; tests/contract/test_data_files_contract.py covers other stores."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.errors import InputError
from batchcls.manifest.snapshot import open_manifest
from batchcls.storage.data_files import DataFiles, find_data_files
from batchcls.storage.filesystem import Storage
from batchcls.storage.uris import relative_path
from tests.helpers.manifests import write_manifest

STORAGE = Storage()


def is_parquet(name: str) -> bool:
    return name.endswith(".parquet")


def find(uri: str | Path, **options: bool) -> DataFiles:
    found = find_data_files(str(uri), STORAGE, is_parquet, **options)
    assert found is not None
    return found


def names(found: DataFiles) -> list[str]:
    return [relative_path(info.uri, found.base) for info in found.files]


def touch(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_hidden_names_are_never_data_at_any_depth(tmp_path: Path):
    root = tmp_path / "_x" / ".cache" / "manifest"
    touch(
        root,
        *("a.parquet", "day=1/b.parquet", "_day=2/c.parquet", "deep/er/d.parquet", "x_y.z.parquet"),
        *("_temporary/0/attempt/e.parquet", ".Trash/f.parquet", ".g.parquet", "._a.parquet", "_metadata"),
        *("deep/_tmp/h.parquet", "deep/.i.parquet", ".a=1/j.parquet", "_k=1.parquet", "@eaDir/a.parquet"),
        *("_SUCCESS", ".a.parquet.crc", ".part.parquet.inprogress.1", "notes.txt", "l.parquet.tmp"),
    )
    found = find(root)
    assert names(found) == [
        "_day=2/c.parquet",
        "a.parquet",
        "day=1/b.parquet",
        "deep/er/d.parquet",
        "x_y.z.parquet",
    ]
    assert found.base == str(root)
    assert found.skipped.hidden == "9 hidden names (.Trash, ._a.parquet, .a=1, ...)"
    assert found.skipped.unexpected == ""
    assert found.partition_keys() == ("_day", "day")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.parquet", ["a.parquet"]),
        ("*", ["a.parquet", "readme.txt"]),
        ("**/*.parquet", ["a.parquet", "s/b.parquet", "s/t/c.parquet"]),
        ("**", ["a.parquet", "readme.txt", "s/b.parquet", "s/t/c.parquet"]),
        ("s/**/c.parquet", ["t/c.parquet"]),
        ("*/*.parquet", ["s/b.parquet"]),
        ("[rs]/?.parquet", ["s/b.parquet"]),
        ("[!r]/**/[bc].parquet", ["s/b.parquet", "s/t/c.parquet"]),
        ("**/t/*", ["s/t/c.parquet"]),
        ("_*.parquet", ["_d.parquet"]),
        (".*/*.parquet", [".h/e.parquet"]),
        ("nothing*", []),
    ],
)
def test_glob_matches_hidden_names_only_explicitly(tmp_path: Path, pattern: str, expected: list[str]):
    touch(tmp_path, "a.parquet", "readme.txt", "s/b.parquet", "s/t/c.parquet", "_d.parquet", ".h/e.parquet")
    found = find_data_files(f"{tmp_path}/{pattern}", STORAGE, lambda name: True)
    assert names(found) == expected if found else expected == []


def test_existing_path_with_glob_characters_is_not_a_glob(tmp_path: Path):
    touch(
        tmp_path,
        *("m [1].parquet", "m 1.parquet", "what?.parquet", "whatx.parquet", "v[1]/a.parquet", "v1/b.parquet"),
        *("*/star.parquet", "v[1]/day=1/c.parquet"),
    )
    for name in ("m [1].parquet", "what?.parquet"):
        found = find(tmp_path / name)
        assert (names(found), found.base) == ([name], str(tmp_path))
    assert names(find(tmp_path / "v[1]")) == ["a.parquet", "day=1/c.parquet"]
    found = find(f"{tmp_path}/v[1]/*.parquet")
    assert (names(found), found.base) == (["a.parquet"], f"{tmp_path}/v[1]")
    assert find(f"{tmp_path}/v[1]/day=*/*.parquet").base == f"{tmp_path}/v[1]"
    assert names(find(f"{tmp_path}/v[1]/b.parquet")) == ["v1/b.parquet"]
    assert names(find(tmp_path / "*")) == ["star.parquet"]


def _link_to_folder(root: Path) -> None:
    (root / "sub" / "link").symlink_to(root.parent / "elsewhere")


def _cycle(root: Path) -> None:
    (root / "sub" / "link").symlink_to(root)


def _dangling(root: Path) -> None:
    (root / "sub" / "link.parquet").symlink_to(root / "gone")


def _loop(root: Path) -> None:
    (root / "sub" / "link.parquet").symlink_to(root / "sub" / "link.parquet")


def _through_a_file(root: Path) -> None:
    (root / "sub" / "link.parquet").symlink_to(root / "a.parquet" / "x")


def _fifo(root: Path) -> None:
    os.mkfifo(root / "sub" / "pipe.parquet")


def _socket(root: Path) -> None:
    here = Path.cwd()
    os.chdir(root / "sub")  # Paths of sockets must be short.
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("s.parquet")
    finally:
        os.chdir(here)


@pytest.mark.parametrize("uri", ["", "/**/*.parquet", "/*/*", "/**"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_link_to_folder, "1 link to a folder, which is not followed (sub/link)"),
        (_cycle, "1 link to a folder, which is not followed (sub/link)"),
        (_dangling, "1 broken symbolic link (sub/link.parquet)"),
        (_loop, "1 broken symbolic link (sub/link.parquet)"),
        (_through_a_file, "1 broken symbolic link (sub/link.parquet)"),
        (_fifo, "1 special file (sub/pipe.parquet)"),
        (_socket, "1 special file (sub/s.parquet)"),
    ],
)
def test_unexpected_skipped_entries_are_counted_and_named(
    tmp_path: Path, make: Callable[[Path], None], message: str, uri: str
):
    root = tmp_path / "root"
    touch(root, "a.parquet", "sub/b.parquet")
    touch(tmp_path / "elsewhere", "c.parquet")
    (root / "sub" / "file-link.parquet").symlink_to(root / "a.parquet")
    make(root)
    found = find(f"{root}{uri}")
    assert found.skipped.unexpected == message
    assert {"sub/b.parquet", "sub/file-link.parquet"} <= set(names(found))
    assert not any("link/" in name for name in names(found))


def test_only_the_first_few_skipped_entries_are_named(tmp_path: Path):
    touch(tmp_path, "a.parquet", "other/deep/b.parquet")
    for number in range(5):
        (tmp_path / f"link{number}").symlink_to(tmp_path / "other")
    (tmp_path / "folder.parquet").mkdir()
    assert (
        find(tmp_path).skipped.unexpected
        == "5 links to folders, which are not followed (link0, link1, link2, ...)"
    )
    assert find(f"{tmp_path}/*.parquet").skipped.unexpected == (
        "1 folder that matches the pattern, although patterns select files only (folder.parquet)"
    )
    assert find(f"{tmp_path}/link[01]/*/*.parquet").skipped.unexpected.startswith("2 links to folders")


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder for tests of permissions, which works even if the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        before = os.geteuid()
        yield Path(folder)
        os.seteuid(before)


def test_unreadable_folder_is_named(unprivileged: Path):
    touch(unprivileged, "a.parquet", "closed/b.parquet")
    (unprivileged / "closed").chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    for uri in (str(unprivileged), f"{unprivileged}/**/*.parquet", f"{unprivileged}/c*/b.parquet"):
        with pytest.raises(InputError, match=r"closed: .*\(PermissionError\)"):
            find(uri)
    assert names(find(f"{unprivileged}/*.parquet")) == ["a.parquet"]


@pytest.mark.parametrize(
    ("log_file", "kind"),
    [
        ("_delta_log/00000000000000000000.json", "Delta"),
        ("metadata/v1.metadata.json", "Iceberg"),
        ("metadata/00000-1b.gz.metadata.json", "Iceberg"),
        (".hoodie/hoodie.properties", "Hudi"),
    ],
)
@pytest.mark.parametrize(
    "uri",
    [
        *("table", "table/*.parquet", "table/data", "table/data/day=1", "table/data/day=1/a.parquet"),
        *("", "*", "**/*.parquet", "*/data/*/*.parquet", "table/data/*/*.parquet", "ta[b]le/**"),
    ],
)
def test_table_with_a_log_is_rejected_at_any_level(tmp_path: Path, log_file: str, kind: str, uri: str):
    lake = tmp_path / "lake"
    touch(
        lake,
        "table/data/day=1/a.parquet",
        "table/p.parquet",
        f"table/{log_file}",
        "plain.parquet",
        "b/c.parquet",
    )
    if uri == "*":
        assert names(find(f"{lake}/*")) == ["plain.parquet"]  # The table is in a subfolder.
        return
    with pytest.raises(InputError) as caught:
        find(f"{lake}/{uri}".rstrip("/"))
    message = str(caught.value)
    assert message.startswith(f"{lake}/table: {kind} tables are not supported")
    assert "\n" not in message
    assert "rows.parquet" in message
    assert names(find(lake / "b")) == ["c.parquet"]
    assert names(find(f"{lake}/b*/*.parquet")) == ["b/c.parquet"]
    assert names(find(lake / "plain.parquet")) == ["plain.parquet"]


def test_folders_of_images_or_named_metadata_are_not_tables(tmp_path: Path):
    touch(tmp_path, "metadata/a.parquet", "metadata/notes.json", "_delta_log.parquet", "delta_log/b.parquet")
    assert names(find(tmp_path)) == ["delta_log/b.parquet", "metadata/a.parquet"]
    touch(tmp_path, "_delta_log/0.json")
    assert find(tmp_path, images=True).files


def test_image_names_can_begin_with_an_underscore(tmp_path: Path):
    touch(
        tmp_path,
        "_DSC1.jpg",
        "._DSC1.jpg",
        "_thumbs/1.jpg",
        ".Trash/2.jpg",
        "@eaDir/x.jpg/S.jpg",
        "a/_MG_2.jpg",
    )
    found = find_data_files(str(tmp_path), STORAGE, lambda name: name.endswith(".jpg"), images=True)
    assert found is not None
    assert names(found) == ["_DSC1.jpg", "a/_MG_2.jpg"]
    assert found.skipped.hidden == "4 hidden names (.Trash, ._DSC1.jpg, @eaDir, ...)"


def test_missing_path_differs_from_a_path_without_data(tmp_path: Path):
    assert find_data_files(str(tmp_path / "no"), STORAGE, is_parquet) is None
    assert find_data_files(f"{tmp_path}/no/*.parquet", STORAGE, is_parquet) is None
    touch(tmp_path, "000000_0", "000001_0")
    found = find(tmp_path)
    assert (found.files, found.others) == ((), ("000000_0", "000001_0"))
    with pytest.raises(InputError, match="000000_0"):
        open_manifest(str(tmp_path), STORAGE)


def test_http_manifest_is_rejected_without_showing_its_signature():
    with pytest.raises(InputError, match=r"https://host/m.parquet: .* not read over http") as caught:
        open_manifest("HTTPS://host/m.parquet?token=secret", STORAGE)
    assert "secret" not in str(caught.value)


def test_skipped_entries_are_logged_and_empty_files_are_rejected(
    tmp_path: Path, log: pytest.LogCaptureFixture
):
    write_manifest(tmp_path / "a.parquet", ["a"])
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "._a.parquet").write_bytes(b"AppleDouble")
    assert open_manifest(str(tmp_path), STORAGE).rows == 1
    assert [(r.levelname, r.getMessage().rpartition("skipping ")[2]) for r in log.records] == [
        ("WARNING", "1 link to a folder, which is not followed (link)"),
        ("INFO", "1 hidden name (._a.parquet)"),
    ]
    (tmp_path / "part-00001.parquet").touch()
    with pytest.raises(InputError, match=r"part-00001.parquet is empty \(0 bytes"):
        open_manifest(str(tmp_path), STORAGE)


@pytest.mark.parametrize("make", [_fifo, _dangling])
def test_special_files_and_broken_links_are_rejected(tmp_path: Path, make: Callable[[Path], None]):
    (tmp_path / "sub").mkdir()
    make(tmp_path)
    (path,) = (tmp_path / "sub").iterdir()
    with pytest.raises(InputError, match=r"(special file|broken symbolic link)"):
        open_manifest(str(path), STORAGE)


def test_partition_column_differs_from_a_missing_column(tmp_path: Path):
    write_manifest(tmp_path / "shop=7" / "a.parquet", ["a"])
    with pytest.raises(InputError, match=r"column shop is not in the files .* hive_partitioning"):
        open_manifest(str(tmp_path), STORAGE, keep=["shop"])
    with pytest.raises(InputError, match="column price is missing"):
        open_manifest(str(tmp_path), STORAGE, keep=["price"])
    pq.write_table(
        pa.table({"item_id": ["a"], "uri": ["b"], "shop": ["8"]}), tmp_path / "shop=7" / "a.parquet"
    )
    assert open_manifest(str(tmp_path), STORAGE, keep=["shop"]).rows == 1
