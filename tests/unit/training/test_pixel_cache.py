"""Prepared pixels: equal to those of classification, stored in parts with failures, and reused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.errors import InputError
from batchcls.images.decode import decode
from batchcls.images.load_config import DecodeLimits, LoadSettings, decode_limits, fetch_policy
from batchcls.images.transform import Transform
from batchcls.manifest.ids import find_invalid_ids
from batchcls.manifest.snapshot import open_manifest
from batchcls.preprocessing import Preprocessing, Views
from batchcls.storage.filesystem import Storage
from batchcls.training import pixel_cache
from batchcls.training.pixel_cache import PixelStore, pixel_folder, pixel_parts, prepare_part, uncropped
from tests.helpers.image_files import write_images

PREPROCESSING = Preprocessing(
    input_height=32, input_width=32, resize_height=36, resize_width=36, mean=(0.5,) * 3, std=(0.5,) * 3
)


def settings(preprocessing: Preprocessing, base: str) -> LoadSettings:
    config = FinetuneConfig(manifest="m", validation="v", model="x", output="o")
    return LoadSettings(
        run_id="test", base=base, kept=(), fetch=fetch_policy(config), limits=decode_limits(config),
        preprocessing=preprocessing, views=Views(), normalize="engine", fetch_threads=2, decode_threads=1,
        block_rows=3,
    )  # fmt: skip


def prepare(folder: Path, state: Path, preprocessing: Preprocessing):
    storage = Storage()
    manifest = open_manifest(str(folder / "manifest.parquet"), storage)
    load = settings(preprocessing, manifest.base)
    parts = pixel_parts(manifest, pixel_folder(str(state), manifest, load))
    bad = find_invalid_ids(manifest, storage)
    outcomes = [prepare_part(part, manifest.columns, storage, load, bad.between(0, 100)) for part in parts]
    return [part.uri for part in parts], outcomes


def test_pixels_equal_those_of_classify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pixel_cache, "PART_ROWS", 4)
    write_images(tmp_path / "images", 10)
    (tmp_path / "images" / "0005.png").write_bytes(b"")
    uris, outcomes = prepare(tmp_path / "images", tmp_path / "state", PREPROCESSING)
    assert [outcome.rows for outcome in outcomes] == [4, 4, 2]
    assert [list(outcome.failures) for outcome in outcomes] == [[], [5], []]
    assert outcomes[1].failures[5][0] == "empty"
    store = PixelStore(uris, Storage(), str(tmp_path / "copies"))
    assert len(store) == 10
    for row in (0, 3, 4, 9):
        data = (tmp_path / "images" / f"{row:04d}.png").read_bytes()
        assert np.array_equal(store[row], Transform(PREPROCESSING)(decode(data, DecodeLimits()).pixels))


def test_existing_part_is_not_prepared_again(tmp_path: Path):
    write_images(tmp_path / "images", 5)
    (tmp_path / "images" / "0001.png").write_bytes(b"x" * 100)
    uris, outcomes = prepare(tmp_path / "images", tmp_path / "state", PREPROCESSING)
    for image in (tmp_path / "images").glob("*.png"):
        image.unlink()
    again, found = prepare(tmp_path / "images", tmp_path / "state", PREPROCESSING)
    assert again == uris
    assert found == outcomes


def test_other_pixel_settings_use_another_folder(tmp_path: Path):
    write_images(tmp_path / "images", 2)
    narrow, _ = prepare(tmp_path / "images", tmp_path / "state", PREPROCESSING)
    wide, _ = prepare(tmp_path / "images", tmp_path / "state", uncropped(PREPROCESSING))
    recolored, _ = prepare(
        tmp_path / "images", tmp_path / "state", PREPROCESSING.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    )
    assert narrow != wide
    assert narrow == recolored
    assert PixelStore(wide, Storage(), str(tmp_path))[0].shape == (36, 36, 3)


def test_node_without_the_parts_is_rejected_with_a_remedy(tmp_path: Path):
    with pytest.raises(InputError, match="--work-dir must be a folder that all of them share"):
        PixelStore([str(tmp_path / "part-000000")], Storage(), str(tmp_path))


def test_remote_parts_are_copied_once(tmp_path: Path):
    storage = Storage()
    array = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.save(tmp_path / "part.npy", array)
    storage.write_atomic("memory://pixels/part.npy", (tmp_path / "part.npy").read_bytes())
    for _ in range(2):
        store = PixelStore(["memory://pixels/part"], storage, str(tmp_path / "copies"))
        assert np.array_equal(store[1], array[1])
        if storage.exists("memory://pixels/part.npy"):
            storage.remove(["memory://pixels/part.npy"])  # it is not read again


def test_returned_image_is_a_writable_copy(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    np.save(tmp_path / "part.npy", np.zeros((1, 4, 4, 3), np.uint8))
    store = PixelStore([str(tmp_path / "part")], Storage(), str(tmp_path))
    store[0][:] = 1
    assert store[0].sum() == 0


def test_number_of_open_files_is_limited(tmp_path: Path):
    """1,200 parts with the common limit of 1,024 open files, in a separate process because of the limit."""
    for number in range(1200):
        np.save(tmp_path / f"part-{number:06d}.npy", np.full((2, 2, 2, 3), number % 256, np.uint8))
    code = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
import numpy as np
from batchcls.storage.filesystem import Storage
from batchcls.training.pixel_cache import PixelStore
store = PixelStore([{str(tmp_path)!r} + f"/part-{{n:06d}}" for n in range(1200)], Storage(), "unused")
assert len(store) == 2400
order = np.random.default_rng(0).permutation(2400)
assert all((store[int(row)] == row // 2 % 256).all() for row in order)
before = len(os.listdir("/proc/self/fd"))
assert before < 200, before
if os.fork() == 0:
    good = all((store[int(row)] == row // 2 % 256).all() for row in order[::-1])
    os._exit(0 if good else 1)
assert all((store[int(row)] == row // 2 % 256).all() for row in order)
assert os.wait()[1] == 0
store.close()
assert len(os.listdir("/proc/self/fd")) < before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_part_that_is_not_an_array_is_reported(tmp_path: Path, content: bytes):
    (tmp_path / "part.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"part\.npy is damaged .*run the same command again"):
        PixelStore([str(tmp_path / "part")], Storage(), "unused")


def test_truncated_part_is_reported_when_read(tmp_path: Path):
    np.save(tmp_path / "part.npy", np.zeros((3, 4, 4, 3), np.uint8))
    whole = (tmp_path / "part.npy").read_bytes()
    (tmp_path / "part.npy").write_bytes(whole[:-1])
    store = PixelStore([str(tmp_path / "part")], Storage(), "unused")
    assert store[1].shape == (4, 4, 3)
    with pytest.raises(InputError, match="truncated"):
        store[2]
