from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchcls.cli.app import run
from batchcls.jobs import manifest
from tests.helpers.drawing import draw, encode
from tests.helpers.manifests import write_manifest


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("shoes/red/1.jpg", "shoes/2.JPEG", "top.png", "hats/3.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(draw(1), "PNG"))
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
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


def test_labels_come_from_the_folders(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    output = tmp_path / "catalog.parquet"
    arguments = ["from-folder", str(photos), "--output", str(output), "--labels-from-folders"]
    assert run("manifest", manifest.COMMANDS, arguments) == 0
    assert pq.read_table(output).column("label").to_pylist() == ["hats", "shoes", "shoes/red", None]
    assert "4 images, 3 labels" in capfd.readouterr().err


def test_labels_from_a_flat_folder_are_an_error(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    output = tmp_path / "catalog.parquet"
    arguments = ["from-folder", str(photos / "hats"), "--output", str(output), "--labels-from-folders"]
    assert run("manifest", manifest.COMMANDS, arguments) == 2
    assert "--labels-from-folders: no image is in a subfolder of" in capfd.readouterr().err
    assert not output.exists()


def test_all_readable_formats_are_found(tmp_path: Path):
    names = ["a.avif", "b.HEIC", "c.heif", "d.jpg"]
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_bytes(b"x")
    made = _made(str(tmp_path / "photos"), tmp_path / "catalog.parquet", labels=False)
    assert made["item_id"] == names


def test_missing_folder_and_manifest_are_reported_with_a_similar_name(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    arguments = ["from-folder", str(tmp_path / "photo"), "--output", str(tmp_path / "x.parquet")]
    assert run("manifest", manifest.COMMANDS, arguments) == 2
    assert f"{tmp_path}/photo does not exist; did you mean {photos.name}?" in capfd.readouterr().err
    write_manifest(tmp_path / "catalog.parquet", ["a"])
    assert run("manifest", manifest.COMMANDS, ["check", str(tmp_path / "catalogs.parquet")]) == 2
    printed = capfd.readouterr().err
    assert f"{tmp_path}/catalogs.parquet does not exist; did you mean catalog.parquet?" in printed


def test_check_says_what_is_in_a_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_manifest(tmp_path / "m.parquet", ["a", None, "a", "b"])
    assert run("manifest", manifest.COMMANDS, ["check", str(path)]) == 0
    printed = capsys.readouterr().out
    for line in ("rows                   4", "null ids               1", "repeated ids           1"):
        assert line in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["from-folder", "nothere", "--output", "x.parquet"], "nothere does not exist"),
        (["from-folder", ".", "--output", "x.parquet"], "no images"),
        (["repair"], "repair"),
        ([], "a command is required: from-folder, check"),
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
    printed = capfd.readouterr().err
    assert words in printed
    assert len(printed.splitlines()) == 1


def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        run("manifest", manifest.COMMANDS, ["from-folder", "--help"])
    assert caught.value.code == 0
    assert "examples:" in capsys.readouterr().out


def _made(folder: str, output: Path, *, labels: bool = True) -> dict[str, list[str]]:
    arguments = [
        "from-folder",
        folder,
        "--output",
        str(output),
        *(["--labels-from-folders"] if labels else []),
    ]
    assert run("manifest", manifest.COMMANDS, arguments) == 0
    return pq.read_table(output).to_pydict()


def test_every_spelling_of_a_folder_makes_the_same_manifest(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    expected = _made(str(photos), tmp_path / "0.parquet")
    assert expected["item_id"][0] == "hats/3.webp"
    assert expected["uri"][0] == str(photos / "hats" / "3.webp")
    spellings = [
        *("photos", "./photos", "photos/", "photos//", ".//photos", "photos/shoes/..", "x/../photos"),
        *(f"{tmp_path}//photos", f"file://{photos}", f"file:{photos}/", f"FILE://localhost{photos}"),
    ]
    for number, spelling in enumerate(spellings, 1):
        assert _made(spelling, tmp_path / f"{number}.parquet") == expected, spelling
    monkeypatch.chdir(photos)
    assert _made(".", tmp_path / "here.parquet") == expected


def test_a_folder_with_brackets_and_a_glob_of_images(photos: Path, tmp_path: Path):
    odd = photos.rename(tmp_path / "photos [1]*")
    assert _made(str(odd), tmp_path / "a.parquet")["item_id"][0] == "hats/3.webp"
    made = _made(f"{odd}/shoes/**/*", tmp_path / "b.parquet")
    assert (made["item_id"], made["label"]) == (["2.JPEG", "red/1.jpg"], [None, "red"])
    assert _made(str(odd / "top.png"), tmp_path / "c.parquet", labels=False)["item_id"] == ["top.png"]


def test_images_that_are_left_out_are_counted_and_named(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for name in (".Trash/9.jpg", "shoes/._2.JPEG", "@eaDir/top.png/S.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"x")
    (photos / "more").symlink_to(tmp_path)
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "_DSC0001.jpg").write_bytes(b"x")
    made = _made(str(photos), tmp_path / "m.parquet")
    assert made["item_id"] == ["_DSC0001.jpg", "hats/3.webp", "shoes/2.JPEG", "shoes/red/1.jpg", "top.png"]
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "WARNING" in line]
    assert warning.endswith(
        "skipped: 1 link to a folder, which is not followed (more); 1 broken symbolic link (gone.jpg); "
        "3 hidden names (.Trash, @eaDir, shoes/._2.JPEG)"
    )


def test_check_warns_of_what_it_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    write_manifest(tmp_path / "m" / "a.parquet", ["a"])
    write_manifest(tmp_path / "other" / "b.parquet", ["b"])
    (tmp_path / "m" / "linked").symlink_to(tmp_path / "other")
    assert run("manifest", manifest.COMMANDS, ["check", str(tmp_path / "m")]) == 0
    assert "WARNING" in (printed := capfd.readouterr().err)
    assert "1 link to a folder, which is not followed (linked)" in printed
    (tmp_path / "m" / "a.parquet").unlink()
    assert run("manifest", manifest.COMMANDS, ["check", str(tmp_path / "m")]) == 2
    assert "(linked)" in capfd.readouterr().err
