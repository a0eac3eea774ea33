"""Recovers Ray Train's list of the checkpoints of a run, which a killed process can leave truncated."""

import json
import logging
import zipfile

import ray

from batchcls.storage.filesystem import Storage, join, redact_uri
from batchcls.training.train_config import CHECKPOINT

LIST = "checkpoint_manager_snapshot.json"
"""Name of Ray Train's list in the folder of a run's checkpoints."""

_logger = logging.getLogger(__name__)


def recover_checkpoint_list(folder: str, storage: Storage) -> None:
    """Write the list of a run's checkpoints again if it is truncated or missing.

    Ray Train overwrites the list in place after every checkpoint. A process that is killed meanwhile leaves an
    empty or truncated file, and Ray Train refuses to start a run with it. The checkpoints themselves are complete
    by then: Ray Train lists a checkpoint after it is stored and removes old ones after they are no longer listed.

    Args:
        folder: URI of the folder with the checkpoints of the run.
        storage: storage that holds the folder.
    """
    names = storage.list_folders(folder)  # named by time, so the order is that of the epochs
    uri = join(folder, LIST)
    exists = storage.exists(uri)
    if (exists and _is_json(storage.read_bytes(uri))) or not (exists or names):
        return
    complete = [name for name in names if _is_complete(join(folder, name, CHECKPOINT), storage)]
    for name in names:
        if name not in complete:
            storage.remove_folder(join(folder, name))
    storage.write_atomic(uri, _list_of(complete))
    _logger.warning(
        "the list of checkpoints in %s was %s, because a process was killed before it had written the list; it has "
        "been written again with %d checkpoint(s)",
        redact_uri(folder),
        "truncated" if exists else "missing",
        len(complete),
    )


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _is_complete(uri: str, storage: Storage) -> bool:
    """Whether a file that `torch.save` writes, which is a ZIP archive, exists and is not truncated."""
    filesystem, path = storage.filesystem(uri)
    try:
        with filesystem.open(path, "rb") as file:
            return zipfile.is_zipfile(file)
    except FileNotFoundError:
        return False


def _list_of(names: list[str]) -> bytes:
    """Return a list in the format of `ray.train.v2._internal.execution.checkpoint.checkpoint_manager`.

    The metrics of a checkpoint are only for callers of `ray.train.Result`; batchcls reads them from the checkpoint.
    """
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    content = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": [*range(1, len(names) + 1)],
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(names),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    return json.dumps(content).encode()
