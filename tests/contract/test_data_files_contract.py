"""Data files and normalization of paths behave equally on local disk, in memory and on a real S3 server."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.errors import InputError
from batchcls.images.url_policy import resolve_uri
from batchcls.jobs import manifest as manifest_job
from batchcls.manifest.snapshot import open_manifest
from batchcls.storage.data_files import find_data_files
from batchcls.storage.filesystem import Storage, join
from batchcls.storage.uris import normalize_uri, relative_path
from tests.conftest import S3Server


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A normalized folder that no other test uses."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "memory":
        return f"memory:///{tmp_path.name}"
    return f"s3://{request.getfixturevalue('s3').bucket}/folder"


@pytest.fixture
def storage(root: str, request: pytest.FixtureRequest) -> Storage:
    if not root.startswith("s3"):
        return Storage()
    return Storage({"endpoint_url": request.getfixturevalue("s3").endpoint_url})


def manifest_bytes(*ids: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"item_id": ids, "uri": [f"images/{name}.jpg" for name in ids]}), sink)
    return bytes(sink.getvalue().to_pybytes())


def put(storage: Storage, root: str, *names: str) -> None:
    for name in names:
        storage.write_atomic(join(root, name), manifest_bytes(name))


def names(storage: Storage, uri: str) -> list[str]:
    found = find_data_files(normalize_uri(uri), storage, lambda name: name.endswith(".parquet"))
    return [relative_path(info.uri, found.base) for info in found.files] if found else []


def test_folders_and_globs_list_the_same_files_in_every_store(storage: Storage, root: str) -> None:
    put(
        storage,
        root,
        *("a.parquet", "s/b.parquet", "s/t/c.parquet", "day=1/d.parquet", "_k=v/e.parquet"),
        *("_temporary/0/f.parquet", ".Trash/g.parquet", ".h.parquet", "._a.parquet", "s/_tmp/i.parquet"),
    )
    everything = ["_k=v/e.parquet", "a.parquet", "day=1/d.parquet", "s/b.parquet", "s/t/c.parquet"]
    assert names(storage, root) == names(storage, f"{root}/") == names(storage, f"{root}/**") == everything
    assert names(storage, f"{root}/*.parquet") == ["a.parquet"]
    assert names(storage, f"{root}/*/*.parquet") == ["_k=v/e.parquet", "day=1/d.parquet", "s/b.parquet"]
    assert names(storage, f"{root}/s/**/[bc].parquet") == ["b.parquet", "t/c.parquet"]
    assert names(storage, f"{root}/**/?.parquet") == everything
    assert names(storage, f"{root}/_t*/0/*.parquet") == ["_temporary/0/f.parquet"]
    assert names(storage, f"{root}/no/*.parquet") == names(storage, f"{root}/no") == []
    found = find_data_files(normalize_uri(root), storage, lambda name: name.endswith(".parquet"))
    assert found is not None
    assert found.skipped.hidden == "5 hidden names (.Trash, ._a.parquet, .h.parquet, ...)"


def test_existing_object_with_glob_characters_is_not_a_glob(storage: Storage, root: str) -> None:
    put(storage, root, "m[1].parquet", "m1.parquet", "v[1]/a.parquet", "v1/b.parquet", "100%20?.parquet")
    assert names(storage, f"{root}/m[1].parquet") == ["m[1].parquet"]
    assert names(storage, f"{root}/100%20?.parquet") == ["100%20?.parquet"]
    assert names(storage, f"{root}/v[1]") == names(storage, f"{root}/v[1]/*.parquet") == ["a.parquet"]
    assert names(storage, f"{root}/v[1]/b.parquet") == ["v1/b.parquet"]
    assert open_manifest(f"{root}/v[1]/*.parquet", storage).base == f"{root}/v[1]"


@pytest.mark.parametrize(
    "log_file", ["_delta_log/0.json", "metadata/v3.metadata.json", ".hoodie/x.properties"]
)
def test_tables_with_a_log_are_rejected_in_every_store(storage: Storage, root: str, log_file: str) -> None:
    put(storage, root, "t/data/k=1/a.parquet", "t/b.parquet", f"t/{log_file}", "plain/c.parquet", "d.parquet")
    for uri in (
        "",
        "/t",
        "/t/data",
        "/t/*.parquet",
        "/*/b.parquet",
        "/t/data/*/*.parquet",
        "/t/b.parquet",
        "/**",
    ):
        with pytest.raises(InputError, match="tables are not supported") as caught:
            names(storage, root + uri)
        assert str(caught.value).startswith(f"{root}/t: ")
    assert names(storage, f"{root}/plain") == ["c.parquet"]
    assert names(storage, f"{root}/*.parquet") == ["d.parquet"]


def test_all_spellings_of_a_path_are_equivalent(
    storage: Storage, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(storage, root, "a b/é+%20/m.parquet")
    location = f"{root}/a b/é+%20"
    first = open_manifest(f"{location}/m.parquet", storage)
    spellings = [location, f"{location}/", f"{location}/*.parquet", f"{location}//"]
    head, separator, rest = root.partition("://")
    if not separator:
        monkeypatch.chdir(root)
        (Path(root) / "link").symlink_to(Path(root) / "a b")
        quoted = location.replace(" ", "%20").replace("é", "%C3%A9").replace("+%20", "+%2520")
        spellings += [
            *(
                "a b/é+%20/m.parquet",
                "./a b/é+%20/m.parquet",
                "a b//é+%20///m.parquet",
                "a b/é+%20/../é+%20/./",
            ),
            *(
                f"file://{quoted}/m.parquet",
                f"file:{quoted}/m.parquet",
                f"FILE://localhost{quoted}/",
                f"/{location}",
            ),
            *("link/é+%20/../é+%20/m.parquet", f"local://{quoted}"),
        ]
    else:
        spellings += [f"{head.upper()}://{rest}/a b/é+%20/m.parquet"]
        spellings += [f"s3a://{rest}/a b/é+%20/m.parquet", f"S3A://{rest}/a b/é+%20/"] if head == "s3" else []
    for spelling in spellings:
        manifest = open_manifest(spelling, storage)
        assert (manifest.base, manifest.fingerprint) == (location, first.fingerprint), spelling
        assert [file.uri for file in manifest.files] == [f"{location}/m.parquet"]


def test_bucket_name_is_not_a_glob() -> None:
    with pytest.raises(InputError, match="buckets"):
        open_manifest("memory://sho*/m.parquet", Storage())


def test_keys_of_s3_are_opaque(s3: S3Server) -> None:
    storage, bucket = Storage({"endpoint_url": s3.endpoint_url}), f"s3://{s3.bucket}"
    for key in ("/m.parquet", "x//m.parquet", "x/m.parquet", "x/./n.parquet", "x/../o.parquet", "x//"):
        filesystem, _ = storage.filesystem(bucket)
        filesystem.call_s3(
            "put_object", Bucket=s3.bucket, Key=key, Body=manifest_bytes(key) if key[-1] != "/" else b""
        )
    for key in ("/m.parquet", "x//m.parquet", "x/m.parquet", "x/./n.parquet", "x/../o.parquet"):
        manifest = open_manifest(f"{bucket}/{key}", storage)
        assert [file.uri for file in manifest.files] == [f"{bucket}/{key}"]
        image = resolve_uri("images/a.jpg", manifest.base)
        assert image == f"{bucket}/{key.rpartition('/')[0]}/images/a.jpg"
    assert names(storage, f"{bucket}/x") == ["/m.parquet", "m.parquet"]


def test_all_spellings_of_a_prefix_create_the_same_manifest(s3: S3Server, tmp_path: Path) -> None:
    options = {"endpoint_url": s3.endpoint_url}
    storage, folder = Storage(options), f"s3://{s3.bucket}/photos"
    for name in ("a/1.jpg", "b [1].png", ".Trash/2.jpg", "a/._1.jpg", "_DSC3.jpg"):
        storage.write_atomic(f"{folder}/{name}", b"x")
    made = []
    for number, spelling in enumerate((folder, f"{folder}/", f"S3{folder[2:]}", f"s3a{folder[2:]}//")):
        output = tmp_path / f"{number}.parquet"
        arguments = [
            "from-folder",
            spelling,
            "--output",
            str(output),
            "--storage-options",
            json.dumps(options),
        ]
        assert run("manifest", manifest_job.COMMANDS, arguments) == 0
        made.append(pq.read_table(output).to_pydict())
    assert made[0]["item_id"] == ["_DSC3.jpg", "a/1.jpg", "b [1].png"]
    assert made[0]["uri"] == [f"{folder}/{name}" for name in made[0]["item_id"]]
    assert all(one == made[0] for one in made)
