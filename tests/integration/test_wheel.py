"""The wheel is complete, and its installation classifies a catalog without the checkout."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import REPOSITORY

IMAGES = 24


def _run(*command: str | Path, cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def environment(clean_environment: dict[str, str]) -> dict[str, str]:
    """The environment without PYTHONPATH, through which the checkout would shadow the wheel."""
    return {name: value for name, value in clean_environment.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def wheel(
    tracked_files: list[str], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Build the wheel from a copy of the tracked files: it holds no untracked file, and the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in tracked_files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    _run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "wheels", "."),
        cwd=source,
        environment=environment,
    )
    (found,) = (source / "wheels").iterdir()
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment with the wheel, and with the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent, environment=environment)
    interpreter = folder / "bin" / "python"
    _run(
        *(sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet"),
        *("--disable-pip-version-check", "--no-deps", "--no-index", wheel),
        cwd=wheel.parent,
        environment=environment,
    )
    # A path in a .pth file is appended to sys.path, and .pth files in that path are not processed. So the wheel
    # precedes all dependencies, and the finder of an editable installation is not active.
    (packages,) = folder.glob("lib/python3*/site-packages")
    dependencies = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    return interpreter


def test_contains_every_file_of_the_package_and_the_license(wheel: Path, tracked_files: list[str]):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {name for name in tracked_files if name.startswith("batchcls/")}
    assert package >= {"batchcls/py.typed", "batchcls/models/zoo.toml"}
    for folder, suffix in (
        ("report/templates", ".html"),
        ("report/templates", ".css"),
        ("training/recipes", ".toml"),
    ):
        assert any(name.startswith(f"batchcls/{folder}/") and name.endswith(suffix) for name in package)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_metadata_matches_the_project(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        header, _, description = archive.read(name).decode().partition("\n\n")
    lines = header.splitlines()
    assert {"Name: batchcls", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(lines)
    assert description.strip() == (REPOSITORY / "README.md").read_text(encoding="utf-8").strip()


@pytest.mark.long
def test_commands_run_from_an_empty_folder(python: Path, environment: dict[str, str], tmp_path: Path):
    location = _run(
        python, "-c", "import batchcls; print(batchcls.__file__)", cwd=tmp_path, environment=environment
    )
    assert Path(location.strip()).is_relative_to(python.parent.parent)
    listed = _run(python.parent / "batchcls", "bundle", "zoo", cwd=tmp_path, environment=environment)
    assert "mobilenet_v3_large" in listed  # from zoo.toml


@pytest.mark.long
def test_classifies_a_catalog_from_an_empty_folder(
    python: Path, tiny_bundle: str, environment: dict[str, str], tmp_path: Path
):
    folder = tmp_path / "empty"
    folder.mkdir()
    drawn = tmp_path / "drawn"
    _run(
        *(python, REPOSITORY / "examples" / "draw_catalog.py", "--output", drawn),
        *("--images", str(IMAGES), "--training-images", "2"),
        cwd=folder,
        environment=environment,
    )
    _run(
        *(python.parent / "batchcls", "classify", "--manifest", drawn / "catalog.parquet"),
        *(
            "--model",
            tiny_bundle,
            "--output",
            "out",
            "--max-failed-fraction",
            "0.5",
            "--ray-address",
            "local",
        ),
        *("--engine", "torch"),
        cwd=folder,
        environment=environment,
    )
    run = folder / "out" / json.loads((folder / "out" / "current.json").read_text())["path"]
    predicted, failed = (
        pq.read_table(run / name).column("row").to_pylist() for name in ("predictions", "quarantine")
    )
    rows = pq.read_metadata(drawn / "catalog.parquet").num_rows
    assert rows > IMAGES
    assert len(predicted) == IMAGES
    assert sorted(predicted + failed) == list(range(rows))
    assert (run / "report.html").stat().st_size > 10_000  # its templates are data files of the wheel
