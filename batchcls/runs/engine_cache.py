"""Store the engines that were selected for each kind of node in the output folder, for later runs.

OUTPUT/engines/BUNDLE-HARDWARE.json, the first digits of the bundle's fingerprint and `Hardware.key`.
"""

import logging

from pydantic import ValidationError

from batchcls.hardware import Hardware
from batchcls.inference.engine_record import EngineRequest, EngineSelectionRecord, installed_versions
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

ENGINES = "engines"
_DIGITS = 12

_logger = logging.getLogger(__name__)


def uri_of(output: str, bundle_fingerprint: str, hardware_key: str) -> str:
    """Where the choice for a model and a kind of node is kept."""
    return join(output, ENGINES, f"{bundle_fingerprint[:_DIGITS]}-{hardware_key}.json")


def load(
    output: str, bundle_fingerprint: str, hardware: Hardware, request: EngineRequest, storage: Storage
) -> EngineSelectionRecord | None:
    """The choice of an earlier run, if it was made for the same model, kind of node and request.

    Args:
        output: the job's output folder.
        bundle_fingerprint: of the model.
        hardware: the kind of node.
        request: what was asked for; a choice for anything else does not count.
        storage: how to reach the folder.

    Returns:
        None where there is none, where it was measured for another request or with other versions of
        the packages that run networks, or where the file is damaged, which is logged as a warning.

    Raises:
        InputError: the store cannot be read.
    """
    uri = uri_of(output, bundle_fingerprint, hardware.key)
    with explain(uri):
        if not storage.exists(uri):
            return None
        data = storage.read_bytes(uri)
    try:
        found = EngineSelectionRecord.model_validate_json(data)
    except ValidationError as error:
        _logger.warning(
            "%s is damaged or of another version (%d fields do not fit); the engines are measured again",
            redact_uri(uri),
            error.error_count(),
        )
        return None
    expected = (bundle_fingerprint, hardware.key, request, installed_versions())
    if (found.bundle_fingerprint, found.hardware_key, found.request, found.versions) != expected:
        return None
    return found


def save(output: str, measured: EngineSelectionRecord, storage: Storage) -> str:
    """Keep a choice, in place of an earlier one for the same model and kind of node; returns its URI.

    Raises:
        InputError: the folder cannot be written to.
    """
    uri = uri_of(output, measured.bundle_fingerprint, measured.hardware_key)
    with explain(uri):
        storage.write_atomic(uri, f"{measured.model_dump_json(indent=2)}\n".encode())
    return uri
