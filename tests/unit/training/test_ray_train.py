"""Tests for the configuration of Ray Train: the location of its checkpoints."""

from pathlib import Path

import pyarrow.fs
import pytest

from batchcls.config.finetune_config import FinetuneConfig
from batchcls.storage.filesystem import Storage
from batchcls.training.ray_train import run_config


@pytest.mark.parametrize(
    ("output", "work_dir", "expected"),
    [
        ("s3://shop/models/v2", None, "shop/models/v2.training/checkpoints"),
        ("s3://shop/models/v2/", "memory://state", "/state/checkpoints"),
        ("models/v2", "s3://shop/state/", "shop/state/checkpoints"),
        ("/models/v2", None, "/models/v2.training/checkpoints"),
        ("file:///models/v2", None, "/models/v2.training/checkpoints"),
    ],
)
def test_checkpoints_are_written_to_the_work_directory(output: str, work_dir: str | None, expected: str):
    config = FinetuneConfig(manifest="m", validation="v", model="x", output=output, work_dir=work_dir)
    found = run_config(config, "run-1", Storage())
    assert found.storage_path == expected
    is_local = isinstance(found.storage_filesystem, pyarrow.fs.LocalFileSystem)
    assert is_local == Path(config.work_folder).is_absolute()
