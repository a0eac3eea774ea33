"""Curves of a training run: lists by epoch, from a file or from a bundle's lineage."""

import json
from collections.abc import Mapping
from typing import Any

from batchcls.errors import InputError
from batchcls.storage import Storage, explain, redact_uri

Curves = Mapping[str, list[float]]

EPOCH = "epoch"


def read_curves(uri: str | None, lineage: Mapping[str, Any], storage: Storage) -> Curves:
    """`epoch` and whatever goes with it, lists of numbers of one length; empty where nothing is known.

    Args:
        uri: a JSON file; None: the lineage's own `curves`.
        lineage: of the bundle.
        storage: how to reach the file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    if uri is None:
        found, name = lineage.get("curves"), "the bundle's lineage"
    else:
        name = f"--training-curves {redact_uri(uri)}"
        with explain(uri):
            data = storage.read_bytes(uri)
        try:
            found = json.loads(data)
        except ValueError as error:
            raise InputError(f"{name} is not JSON ({error})") from None
    if found is None:
        return {}
    if not _are_curves(found):
        raise InputError(
            f'{name}: curves have the form {{"epoch": [1, 2], "loss": [0.9, 0.7], "learning_rate": [...]}}, lists of '
            "numbers of one length"
        )
    return {str(key): [float(value) for value in values] for key, values in found.items()}


def _are_curves(found: Any) -> bool:
    if not isinstance(found, dict) or EPOCH not in found:
        return False
    lists = list(found.values())
    return (
        all(isinstance(values, list) for values in lists)
        and len({len(values) for values in lists}) == 1
        and len(lists[0]) > 0
        and all(isinstance(value, int | float) for values in lists for value in values)
    )
