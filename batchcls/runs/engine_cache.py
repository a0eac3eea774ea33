"""Store the engines that were selected for each kind of node in the output folder, for later runs.

A file is named OUTPUT/engines/BUNDLE-HARDWARE.json after the first digits of the bundle's fingerprint and
`Hardware.key`.
"""

import logging

from batchcls.hardware import Hardware
from batchcls.inference.engine_record import EngineRequest, EngineSelectionRecord, installed_versions
from batchcls.storage.documents import DocumentError
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

ENGINES = "engines"
_DIGITS = 12

_logger = logging.getLogger(__name__)


def uri_of(output: str, bundle_fingerprint: str, hardware_key: str) -> str:
    """URI of the selection for a model and a kind of node."""
    return join(output, ENGINES, f"{bundle_fingerprint[:_DIGITS]}-{hardware_key}.json")


def load(
    output: str, bundle_fingerprint: str, hardware: Hardware, request: EngineRequest, storage: Storage
) -> EngineSelectionRecord | None:
    """The selection of an earlier run for the same model, kind of node and request.

    Args:
        output: the job's output folder.
        bundle_fingerprint: of the model.
        hardware: the kind of node.
        request: engine, precision and tolerance that were requested.
        storage: access to the folder.

    Returns:
        None if there is no file, if it is for another request or other versions of the inference packages, or if it is
        damaged, which is logged as a warning.

    Raises:
        InputError: the store cannot be read.
    """
    uri = uri_of(output, bundle_fingerprint, hardware.key)
    with explain(uri):
        if not storage.exists(uri):
            return None
        data = storage.read_bytes(uri)
    try:
        found = EngineSelectionRecord.from_json(data)
    except DocumentError as error:
        _logger.warning(
            "%s is damaged or of another version (%s); the engines are measured again", redact_uri(uri), error
        )
        return None
    expected = (bundle_fingerprint, hardware.key, request, installed_versions())
    if (found.bundle_fingerprint, found.hardware_key, found.request, found.versions) != expected:
        return None
    return found


def save(output: str, selection: EngineSelectionRecord, storage: Storage) -> str:
    """Store a selection, replacing an earlier one for the same model and kind of node; returns its URI.

    Raises:
        InputError: the folder cannot be written to.
    """
    uri = uri_of(output, selection.bundle_fingerprint, selection.hardware_key)
    with explain(uri):
        storage.write_atomic(uri, selection.to_json())
    return uri
