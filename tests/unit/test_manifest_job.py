from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchcls.jobs import manifest
from batchcls.jobs.command import run
from tests.drawing import draw, encode
from tests.manifests import write_manifest


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("shoes/red/1.jpg", "shoes/2.JPEG", "top.png", "hats/3.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(1), "PNG"))
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"


def test_a_folder_becomes_a_manifest_that_the_job_accepts(photos: Path, tmp_path: Path):
    output = tmp_path / "elsewhere" / "catalog.parquet"
    assert run("manifest", manifest.COMMANDS, ["from-folder", str(photos), "--output", str(output)]) == 0
    table = pq.read_table(output)
    assert table.column("item_id").to_pylist() == [
        "hats/3.webp",
        "shoes/2.JPEG",
        "shoes/red/1.jpg",
        "top.png",
    ]
    assert all(Path(uri).is_absolute() and Path(uri).is_file() for uri in table.column("uri").to_pylist())
    assert "label" not in table.column_names
    assert run("manifest", manifest.COMMANDS, ["check", str(output)]) == 0


def test_labels_come_from_the_folders(photos: Path, tmp_path: Path):
    output = tmp_path / "catalog.parquet"
    arguments = ["from-folder", str(photos), "--output", str(output), "--labels-from-folders"]
    assert run("manifest", manifest.COMMANDS, arguments) == 0
    assert pq.read_table(output).column("label").to_pylist() == ["hats", "shoes", "shoes/red", None]


def test_check_says_what_is_in_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_manifest(tmp_path / "m.parquet", ["a", None, "a", "b"])
    assert run("manifest", manifest.COMMANDS, ["check", str(path)]) == 0
    said = capsys.readouterr().out
    for line in ("rows                    4", "null ids                1", "repeated ids            1"):
        assert line in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere.parquet"], "nowhere.parquet"),
        (["from-folder", ".", "--output", "x.parquet"], "no pictures"),
        (["mend"], "mend"),
        ([], "say what to do: from-folder, check"),
    ],
)
def test_mistakes_end_with_2_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
):
    monkeypatch.chdir(tmp_path)
    assert run("manifest", manifest.COMMANDS, arguments) == 2
    said = capfd.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        run("manifest", manifest.COMMANDS, ["from-folder", "--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out
