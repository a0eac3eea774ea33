"""Store the classifiers of the runs of an output folder, each once, as OUTPUT/heads/DIGEST.safetensors.

A later run checks with the classifier of an earlier one that stored embeddings reproduce stored predictions. If it is
missing, the later run computes its predictions from the images.
"""

import logging
from collections.abc import Collection

from batchcls.errors import InputError
from batchcls.models.classifier_head import ClassifierHead
from batchcls.runs.catalog import DamagedRunError, read_plan, run_names
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

HEADS = "heads"
_SUFFIX = ".safetensors"

_logger = logging.getLogger(__name__)


def uri_of(output: str, digest: str) -> str:
    """URI of a classifier."""
    return join(output, HEADS, f"{digest}{_SUFFIX}")


def save(output: str, head: ClassifierHead, storage: Storage) -> None:
    """Store a classifier unless it is stored already.

    Raises:
        OSError: the folder cannot be written to.
    """
    uri = uri_of(output, head.digest)
    if not storage.exists(uri):
        storage.write_atomic(uri, head.to_safetensors())


def load(output: str, digest: str, storage: Storage) -> ClassifierHead:
    """Read a classifier.

    Raises:
        InputError: it is missing or damaged, or the store cannot be read.
    """
    uri = uri_of(output, digest)
    with explain(uri):
        head = ClassifierHead.from_safetensors(storage.read_bytes(uri))
    if head.digest != digest:
        raise InputError(f"{redact_uri(uri)} is damaged: its contents do not have the digest in its name")
    return head


def remove_unused(output: str, storage: Storage) -> int:
    """Remove the classifiers of runs that do not exist anymore, and return the number of freed bytes.

    Nothing is removed if a run cannot be read, because its classifier is not known.

    Raises:
        InputError: the store denies access.
    """
    folder = join(output, HEADS)
    with explain(folder):
        stored = storage.list_direct_files(folder)
    try:
        used = _used(output, storage) if stored else ()
    except DamagedRunError as error:
        _logger.warning("no classifier is removed: %s", error)
        return 0
    unused = [info for info in stored if info.uri.rpartition("/")[2].removesuffix(_SUFFIX) not in used]
    with explain(folder):
        storage.remove([info.uri for info in unused])
    return sum(info.size for info in unused)


def _used(output: str, storage: Storage) -> Collection[str]:
    plans = [read_plan(output, name, storage) for name in run_names(output, storage)]
    return {plan.model.layers.head for plan in plans if plan is not None and plan.model.layers is not None}
