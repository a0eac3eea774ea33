from pathlib import Path

import pytest

from batchcls.storage.filesystem import Storage
from batchcls.storage.missing_paths import missing_path_message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("catalog.parquet", "photos", "b\udcff"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_message_suggests_the_most_similar_name_of_the_parent_folder(folder: Path):
    path = folder / "catalogs.parquet"
    assert missing_path_message(str(path), Storage()) == (
        f"{path} does not exist; did you mean catalog.parquet?"
    )
    assert missing_path_message(f"file://{path}", Storage()) == (
        f"{path} does not exist; did you mean catalog.parquet?"
    )


@pytest.mark.parametrize("name", ["xyz", "xyz/photo", "b\x80"])
def test_message_without_a_similar_name(folder: Path, name: str):
    assert missing_path_message(str(folder / name), Storage()) == f"{folder / name} does not exist"


@pytest.mark.parametrize("uri", ["s3://bucket/photo", "https://host/photo"])
def test_existing_and_remote_paths_have_no_message(folder: Path, uri: str):
    assert missing_path_message(uri, Storage()) is None
    assert missing_path_message(str(folder / "photos"), Storage()) is None
