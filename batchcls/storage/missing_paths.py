"""Describe local paths that do not exist."""

import difflib
import os
from itertools import islice

from batchcls.storage.filesystem import Storage, explain
from batchcls.storage.uris import is_remote, local_path

_MAX_NAMES = 10_000
"""Number of names in a folder that are compared; comparing millions would take minutes."""


def missing_path_message(uri: str, storage: Storage) -> str | None:
    """Describe a local path that does not exist, with the most similar name in its parent folder.

    Returns:
        `PATH does not exist`, or `PATH does not exist; did you mean NAME?`; None if the path exists or is remote,
        because object stores have no folders.

    Raises:
        InputError: access to the path is denied.
    """
    if is_remote(uri):
        return None
    with explain(uri):
        if storage.exists(uri):
            return None
    path = local_path(uri)
    similar = _most_similar_name(path)
    return f"{path} does not exist" + (f"; did you mean {similar}?" if similar else "")


def _most_similar_name(path: str) -> str | None:
    folder, name = os.path.split(path.rstrip("/"))
    try:
        with os.scandir(folder or ".") as entries:
            # Names that are not valid UTF-8 contain surrogates, which are not printable.
            names = [entry.name for entry in islice(entries, _MAX_NAMES) if entry.name.isprintable()]
    except OSError:
        return None
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)
