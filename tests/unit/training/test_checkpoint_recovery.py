"""Tests for the recovery of Ray Train's list of checkpoints, read by Ray Train's own checkpoint manager."""

import io
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from ray.train import CheckpointConfig
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from batchcls.storage.filesystem import Storage
from batchcls.training.checkpoint_recovery import LIST, recover_checkpoint_list
from batchcls.training.train_config import CHECKPOINT
from tests.conftest import S3Server

FIRST, SECOND, THIRD = (f"checkpoint_2026-11-28_15-00-0{second}.123456" for second in (1, 2, 3))


def checkpoint(epoch: int) -> bytes:
    file = io.BytesIO()
    torch.save({"epoch": epoch}, file)
    return file.getvalue()


def write_run(folder: str, storage: Storage) -> None:
    """Write two complete checkpoints and one that is truncated."""
    for epoch, name in enumerate((FIRST, SECOND), start=1):
        storage.write_atomic(f"{folder}/{name}/{CHECKPOINT}", checkpoint(epoch))
    storage.write_atomic(f"{folder}/{THIRD}/{CHECKPOINT}", checkpoint(3)[:-9])


def manager_of(folder: Path) -> CheckpointManager:
    context = StorageContext(
        str(folder.parent),
        experiment_dir_name=folder.name,
        storage_filesystem=pyarrow.fs.LocalFileSystem(),
        read_only=True,
    )
    return CheckpointManager(CheckpointConfig(num_to_keep=2), context)


@pytest.mark.parametrize("content", [b"", b'{"ray_version": "2', None])
def test_truncated_or_missing_list_is_written_again(
    tmp_path: Path, content: bytes | None, log: pytest.LogCaptureFixture
):
    folder = tmp_path / "run-1"
    write_run(str(folder), Storage())
    if content is not None:
        (folder / LIST).write_bytes(content)
        with pytest.raises(CheckpointManagerInitializationError):
            manager_of(folder)
    recover_checkpoint_list(str(folder), Storage())
    manager = manager_of(folder)
    assert manager.latest_checkpoint_result.checkpoint.path == str(folder / SECOND)
    assert [Path(result.checkpoint.path).name for result in manager.best_checkpoint_results] == [
        FIRST,
        SECOND,
    ]
    assert not (folder / THIRD).exists()
    assert "written again with 2 checkpoint(s)" in log.text
    written = (folder / LIST).read_bytes()
    recover_checkpoint_list(str(folder), Storage())
    assert (folder / LIST).read_bytes() == written


def test_list_without_a_complete_checkpoint_starts_from_the_first_epoch(tmp_path: Path):
    folder = tmp_path / "run-1"
    folder.mkdir()
    (folder / LIST).write_bytes(b"")
    recover_checkpoint_list(str(folder), Storage())
    assert manager_of(folder).latest_checkpoint_result is None


def test_new_run_has_no_list(tmp_path: Path, log: pytest.LogCaptureFixture):
    recover_checkpoint_list(str(tmp_path / "run-1"), Storage())
    assert not (tmp_path / "run-1").exists()
    assert log.text == ""


def test_list_in_a_bucket_is_written_again(s3: S3Server):
    folder, storage = f"s3://{s3.bucket}/run-1", Storage()
    write_run(folder, storage)
    recover_checkpoint_list(folder, storage)
    assert storage.list_folders(folder) == [FIRST, SECOND]
    assert SECOND.encode() in storage.read_bytes(f"{folder}/{LIST}")
