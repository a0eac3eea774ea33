"""Normalization of paths and URIs, which all settings with paths use."""

import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from batchcls.config.bundle_config import (
    BundleCreateConfig,
    BundleExportConfig,
    BundleInspectConfig,
    BundleTestConfig,
)
from batchcls.config.classify_config import ClassifyConfig
from batchcls.config.compare_config import CompareConfig
from batchcls.config.evaluate_config import EvaluateConfig
from batchcls.config.finetune_config import FinetuneConfig
from batchcls.config.manifest_config import ManifestCheckConfig, ManifestFromFolderConfig
from batchcls.config.runs_config import RunsDiffConfig, RunsListConfig
from batchcls.errors import InputError
from batchcls.runs.plan import Fingerprints
from batchcls.storage.uris import (
    canonical_location,
    has_scheme,
    local_path,
    normalize_uri,
    parent_folder,
    redact_uri,
    relative_path,
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    return tmp_path


@pytest.mark.parametrize(
    ("spelling", "form"),
    [
        *(
            (f"{sign}a/m.parquet", "HERE/a/m.parquet")
            for sign in ("", "./", "././", ".//", "b/../", "HERE/", "HERE//")
        ),
        ("a/./b//c/", "HERE/a/b/c"),
        (".", "HERE"),
        ("", "HERE"),
        ("/", "/"),
        ("//a", "/a"),
        ("///", "/"),
        ("/..", "/"),
        ("/../a", "/a"),
        ("a/..", "HERE"),
        ("link/m", "HERE/link/m"),
        ("link/../m", "HERE/real/m"),
        ("link/..//../link/x", "HERE/link/x"),
        ("file://HERE/a%20b/%5B1%5D.parquet", "HERE/a b/[1].parquet"),
        ("file:HERE/a%20b", "HERE/a b"),
        ("FILE://localhostHERE/a//b/", "HERE/a/b"),
        ("local://HERE/a", "HERE/a"),
        ("file:////a", "/a"),
        ("file:///", "/"),
        ("/a%20b", "/a%20b"),
        ("a b /ü?*[1]#x", "HERE/a b /ü?*[1]#x"),
        ("~", "HERE/home"),
        ("~/", "HERE/home"),
        ("~/a", "HERE/home/a"),
        ("a/~", "HERE/a/~"),
        ("./~/a", "HERE/~/a"),
        ("a:b", "HERE/a:b"),
        ("odd::name", "HERE/odd::name"),
        ("./C:\\x", "HERE/C:\\x"),
        ("a\\b", "HERE/a\\b"),
        ("S3://Bucket/Key/", "s3://Bucket/Key"),
        ("s3a://b/k//", "s3://b/k"),
        ("S3A://b", "s3://b"),
        ("s3://b/", "s3://b"),
        ("s3://b//k", "s3://b//k"),
        ("s3://b/./a/../k%20 ", "s3://b/./a/../k%20 "),
        ("s3://b/*.parquet", "s3://b/*.parquet"),
        ("GCS://b/k", "gs://b/k"),
        ("Memory://x/", "memory://x"),
        ("memory:///", "memory:///"),
        ("SimpleCache::s3://b/k/", "simplecache::s3://b/k"),
        ("HTTPS://host/a/?sig=%2F/", "https://host/a/?sig=%2F/"),
        ("http://host//a/../b#x", "http://host//a/../b#x"),
    ],
)
def test_normalization_is_unique_and_idempotent(here: Path, spelling: str, form: str):
    spelling, form = spelling.replace("HERE", str(here)), form.replace("HERE", str(here))
    assert normalize_uri(spelling) == form
    assert normalize_uri(form) == form


def test_normalized_path_refers_to_the_same_file(here: Path):
    (here / "real" / "m").write_text("right")
    (here / "m").write_text("wrong")
    assert Path("link/../m").read_text() == Path(normalize_uri("link/../m")).read_text() == "right"


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        (r"C:\photos\m.parquet", "Windows path"),
        ("c:/photos", "Windows path"),
        (r"\\server\share", "Windows path"),
        ("s3:/bucket/key", "s3://..."),
        ("S3:bucket", "s3://..."),
        ("https:/host/x", "https://..."),
        ("s3:///key", "no bucket"),
        ("s3://", "no bucket"),
        ("gs:///key", "no bucket"),
        ("file://relative/m.parquet", "host"),
        ("a\0b", "null byte"),
        ("~no-such-user/x", "no home"),
    ],
)
def test_invalid_uris_are_rejected_with_a_remedy(here: Path, spelling: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        normalize_uri(spelling)
    assert "\n" not in str(caught.value)


def test_existing_file_named_like_a_user_is_not_expanded(here: Path):
    (here / "~root").touch()
    assert normalize_uri("~root") == f"{here}/~root"


def test_file_names_with_invalid_utf8_are_decoded(here: Path):
    name = os.fsdecode(b"caf\xe9.parquet")
    (here / name).touch()
    assert Path(normalize_uri(f"file://{here}/caf%E9.parquet")).exists()
    assert local_path("file:///caf%E9") == os.fsdecode(b"/caf\xe9")


def test_normalized_uris_are_redacted(here: Path):
    assert redact_uri(normalize_uri("S3A://key:secret@bucket/x/")) == "s3://bucket/x"
    assert redact_uri(normalize_uri("HTTPS://me:pw@host/a?token=1")) == "https://host/a"
    for spelling in ("s3:/key:secret@bucket/x", "s3://key:secret@/x\0"):
        with pytest.raises(InputError) as caught:
            normalize_uri(spelling)
        assert "secret" not in str(caught.value)


def test_canonical_location_resolves_links(here: Path):
    assert (
        canonical_location(normalize_uri("link/x"))
        == canonical_location(normalize_uri("real/deep/x"))
        == f"{here}/real/deep/x"
    )
    assert canonical_location("s3://me:pw@b/k") == "s3://b/k"


@pytest.mark.parametrize(
    ("uri", "folder", "name"),
    [
        ("/a/m", "/a", "m"),
        ("/m", "/", "m"),
        ("m", ".", "m"),
        ("s3://b/a/m", "s3://b/a", "m"),
        ("s3://b/m", "s3://b", "m"),
        ("s3://b//m", "s3://b//", "m"),
        ("s3://b/a//m", "s3://b/a//", "m"),
    ],
)
def test_parent_folder_and_relative_path(uri: str, folder: str, name: str):
    assert parent_folder(uri) == folder
    assert relative_path(uri, folder) == name
    assert relative_path("/a/b//c", "/a") == "b//c"
    assert relative_path("s3://b//m", "s3://b") == "/m"
    assert has_scheme("file:/a")
    assert not has_scheme("file:a")


_SETTINGS: list[tuple[type[BaseModel], dict[str, object], tuple[str, ...]]] = [
    (
        ClassifyConfig,
        {"manifest": "m", "output": "o", "model": "./m"},
        ("manifest", "output", "model", "weights", "labels", "allowed_root"),
    ),
    (
        CompareConfig,
        {"manifest": "m", "output": "o", "models": ["./m"]},
        ("manifest", "output", "models", "allowed_root"),
    ),
    (
        EvaluateConfig,
        {"manifest": "m", "output": "o"},
        ("manifest", "output", "model", "run", "write_bundle", "training_curves", "allowed_root"),
    ),
    (
        FinetuneConfig,
        {"manifest": "m", "validation": "v", "output": "o", "model": "./m"},
        ("manifest", "validation", "output", "model", "weights", "labels", "work_dir", "allowed_root"),
    ),
    (ManifestCheckConfig, {"manifest": "m"}, ("manifest",)),
    (ManifestFromFolderConfig, {"folder": "f", "output": "o"}, ("folder", "output")),
    (RunsListConfig, {"output": "o"}, ("output",)),
    (RunsDiffConfig, {"output": "o", "old": "a", "new": "b"}, ("output", "to")),
    (
        BundleCreateConfig,
        {"model": "timm:x", "output": "o"},
        ("model", "output", "weights", "labels", "category_paths"),
    ),
    (BundleInspectConfig, {"bundle": "b"}, ("bundle",)),
    (BundleTestConfig, {"bundle": "b"}, ("bundle",)),
    (BundleExportConfig, {"bundle": "b", "output": "o"}, ("bundle", "output")),
]


@pytest.mark.parametrize(
    ("settings", "required", "name"),
    [(settings, required, name) for settings, required, names in _SETTINGS for name in names],
)
def test_settings_with_paths_are_normalized(
    here: Path, settings: type[BaseModel], required: dict[str, object], name: str
):
    def parse(value: str) -> object:
        value = value.replace("HERE", str(here))
        found = getattr(
            settings.model_validate(required | {name: [value] if name in _LISTS else value}), name
        )
        return found[0] if name in _LISTS else found

    for spelling in ("./x//y/", "HERE/x/./y", "file://HERE/x/y", "link/../../x/y"):
        assert parse(spelling) == f"{here}/x/y"
    for wrong in (r"C:\x", "s3:/b/k"):
        with pytest.raises(ValidationError):
            parse(wrong)
    if name == "allowed_root":
        with pytest.raises(ValidationError, match="a local folder"):
            parse("s3://b/k")
    else:
        assert parse("S3A://b/k/") == "s3://b/k"


_LISTS = ("allowed_root", "models")


@pytest.mark.parametrize(
    "name", ["resnet50", "timm:resnet50.a1_in1k", "torchvision:resnet18", "timm:hf-hub:a/b"]
)
def test_model_names_are_not_normalized(here: Path, name: str):
    assert ClassifyConfig(manifest="m", output="o", model=name).model == name
    assert CompareConfig(manifest="m", output="o", models=[name]).models == [name]


def test_duplicate_models_are_detected_after_normalization(here: Path):
    with pytest.raises(ValidationError, match="twice"):
        CompareConfig(manifest="m", output="o", models=["./x", f"{here}/x/"])


def test_cache_dir_is_a_local_folder_of_each_node(here: Path):
    for value, expected in (("~/cache", "~/cache"), ("file:///a%20b", "/a b"), ("x/../y", "x/../y")):
        assert BundleTestConfig(bundle="b", cache_dir=value).cache_dir == expected
    for wrong in ("s3://b/cache", "s3:/b", r"C:\cache"):
        with pytest.raises(ValidationError):
            BundleTestConfig(bundle="b", cache_dir=wrong)


def test_fingerprints_do_not_depend_on_the_spelling_of_paths(here: Path):
    plain = ClassifyConfig(manifest="m", output="o", model="timm:x", allowed_root=["real/deep", "a"])
    other = ClassifyConfig(
        manifest=f"file://{here}/m",
        output="./o/",
        model="timm:x",
        allowed_root=["./real//deep/", f"file:{here}/a"],
    )
    assert other == plain
    found = Fingerprints.of(plain, "m", "b").differences(Fingerprints.of(other, "m", "b"))
    assert found == []
    assert plain.redacted() == other.redacted()
