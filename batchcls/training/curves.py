"""Curves for TensorBoard, written epoch by epoch."""

import tempfile
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from batchcls.storage import Storage, is_remote, join, local_path
from batchcls.training.settings import Record

_SHOWN = (
    "learning_rate",
    "images_per_second",
    "loss",
    "top1",
    "validation_loss",
    "validation_top1",
    "validation_top5",
)


class Curves:
    """One event file of TensorBoard, on disk or copied to a store after each epoch."""

    def __init__(self, folder: str, storage: Storage) -> None:
        self._folder, self._storage = folder, storage
        self._here = tempfile.mkdtemp(prefix="batchcls-curves-") if is_remote(folder) else local_path(folder)
        self._writer: SummaryWriter | None = None

    def add(self, record: Record) -> None:
        """Add an epoch; of an earlier run of the same epoch the later one counts."""
        epoch = record["epoch"]
        if self._writer is None:
            self._writer = SummaryWriter(self._here, purge_step=epoch)
        for name in _SHOWN:
            group, _, rest = name.rpartition("_") if name.startswith("validation") else ("training", "", name)
            self._writer.add_scalar(f"{group}/{rest}", record[name], epoch)
        self._writer.flush()
        if is_remote(self._folder):
            for path in Path(self._here).iterdir():
                self._storage.write_whole(join(self._folder, path.name), path.read_bytes())
