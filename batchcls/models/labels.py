"""Reads class names from files, in the order of a classifier's outputs; see also `imagenet_labels.known_labels`."""

import hashlib
import json
from collections.abc import Sequence

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage, explain, redact_uri

Labels = tuple[str, ...]
CategoryPaths = tuple[tuple[str, ...], ...]


def read_labels(uri: str, storage: Storage) -> Labels:
    """Read labels from a file: a JSON list in `*.json`, otherwise UTF-8 text with one label per line.

    Raises:
        InputError: the file does not exist or has another format, or a label is empty or repeated; the message names
            the line (or the position in the list).
    """
    name = redact_uri(uri)
    with explain(uri):
        data = storage.read_bytes(uri)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--labels {name} is not UTF-8 ({error}); save it as UTF-8") from error
    if uri.lower().endswith(".json"):
        return _validated(_parse_json_list(text, name), f"--labels {name}, item")
    return _validated([line.strip() for line in text.splitlines()], f"--labels {name}, line")


def read_category_paths(uri: str, labels: Labels, storage: Storage) -> CategoryPaths:
    """Read the category path of each label: UTF-8 text with one `a/b/c` per line, in the order of the labels.

    Raises:
        InputError: the file cannot be read, its number of lines differs from the number of labels, or a path is empty
            or has an empty part; the message names the line.
    """
    name = redact_uri(uri)
    with explain(uri):
        data = storage.read_bytes(uri)
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--category-paths {name} is not UTF-8 ({error}); save it as UTF-8") from error
    if len(lines) != len(labels):
        raise InputError(
            f"--category-paths {name} has {len(lines)} lines for {len(labels)} labels; write one path per label"
        )
    return tuple(
        parse_category_path(line, f"--category-paths {name}, line {number}")
        for number, line in enumerate(lines, start=1)
    )


def parse_category_path(text: str, where: str) -> tuple[str, ...]:
    """Split a path `a/b/c` in the category tree into its parts. Raises InputError if a part is empty."""
    path = tuple(part.strip() for part in text.split("/"))
    if not all(path):
        raise InputError(f"{where}: a part of the path is empty; every part needs a name")
    return path


def check_labels(labels: Sequence[str], where: str) -> Labels:
    """Return the labels as a tuple.

    Raises:
        InputError: there are no labels, or one is empty, repeated or not valid Unicode.
    """
    return _validated(labels, f"{where}, label")


def _parse_json_list(text: str, name: str) -> list[str]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--labels {name} is not JSON ({error})") from error
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InputError(f'--labels {name} must contain a JSON list of strings, such as ["mug", "plate"]')
    return items


def _validated(labels: Sequence[str], where: str) -> Labels:
    if not labels:
        raise InputError(f"{where} 1: there are no labels; a classifier needs one label per class")
    first_occurrence: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not label.strip():
            raise InputError(f"{where} {number}: the label is empty; each class needs a name")
        if not label.isascii() and label.encode(errors="replace").decode() != label:
            raise InputError(
                f"{where} {number}: {label!r} is not valid Unicode (an unpaired surrogate); correct it"
            )
        if label in first_occurrence:
            raise InputError(
                f"{where} {number}: {label!r} is a duplicate of {first_occurrence[label]}; labels must be unique"
            )
        first_occurrence[label] = number
    return tuple(labels)


def labels_digest(labels: Sequence[str]) -> str:
    """Return the SHA-256 of the labels in order, in lower-case hexadecimal."""
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
