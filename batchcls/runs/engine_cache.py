"""Store the engines that were selected for each kind of node in the output folder, for later runs.

A file is named OUTPUT/engines/NETWORK-HARDWARE.json after the first digits of `ModelLayers.network` and `Hardware.key`:
a selection holds for all labels and calibrations of a network. It also holds for other classifiers on the same trunk,
which are one layer of it, except in int8, whose accuracy is limited by the agreement of the classes only.
"""

import logging

from batchcls.hardware import Hardware
from batchcls.inference.engine_record import EngineRequest, EngineSelectionRecord, installed_versions
from batchcls.models.classifier_head import ModelLayers
from batchcls.storage.documents import DocumentError
from batchcls.storage.filesystem import Storage, explain, join, redact_uri

ENGINES = "engines"
_DIGITS = 12

_logger = logging.getLogger(__name__)


def uri_of(output: str, layers: ModelLayers, hardware_key: str) -> str:
    """URI of the selection for a model and a kind of node."""
    return join(output, ENGINES, f"{layers.network[:_DIGITS]}-{hardware_key}.json")


def load(
    output: str, layers: ModelLayers, hardware: Hardware, request: EngineRequest, storage: Storage
) -> EngineSelectionRecord | None:
    """The selection of an earlier run for the same model, kind of node and request.

    Args:
        output: the job's output folder.
        layers: of the model.
        hardware: the kind of node.
        request: engine, precision and tolerance that were requested.
        storage: access to the folder.

    Returns:
        None if there is no file, if it is for another request or other versions of the inference packages, or if it is
        damaged, which is logged as a warning.

    Raises:
        InputError: the store cannot be read.
    """
    uri = uri_of(output, layers, hardware.key)
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
    expected = (hardware.key, request, installed_versions())
    if (found.hardware_key, found.request, found.versions) != expected or found.layers is None:
        return None
    is_same_head = found.layers.head == layers.head
    if found.layers.network != layers.network or (found.precision == "int8" and not is_same_head):
        return None
    return found


def save(output: str, selection: EngineSelectionRecord, storage: Storage) -> str:
    """Store a selection, replacing an earlier one for the same network and kind of node; returns its URI.

    Raises:
        InputError: the folder cannot be written to.
    """
    assert selection.layers is not None
    uri = uri_of(output, selection.layers, selection.hardware_key)
    with explain(uri):
        storage.write_atomic(uri, selection.to_json())
    return uri
