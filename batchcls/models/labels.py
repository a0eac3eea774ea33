"""Class names, in the order of a classifier's outputs, from a file; `known_labels` has those of ImageNet."""

import hashlib
import json
from collections.abc import Sequence

from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage, explain, redact_uri

Labels = tuple[str, ...]
CategoryPaths = tuple[tuple[str, ...], ...]


def read_labels(uri: str, storage: Storage) -> Labels:
    """Labels of a file: a JSON list in `*.json`, otherwise UTF-8 text with one label a line.

    Raises:
        InputError: the file is not there or not of that form, or a label is empty or repeated;
            the message names the line (or the place in the list).
    """
    name = redact_uri(uri)
    with explain(uri):
        data = storage.read_bytes(uri)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--labels {name} is not UTF-8 ({error}); save it as UTF-8") from error
    if uri.lower().endswith(".json"):
        return _checked(_json_list(text, name), f"--labels {name}, item")
    return _checked([line.strip() for line in text.splitlines()], f"--labels {name}, line")


def read_category_paths(uri: str, labels: Labels, storage: Storage) -> CategoryPaths:
    """Paths of the labels in a tree of categories: UTF-8 text, one `a/b/c` a line, in the labels' order.

    Raises:
        InputError: the file cannot be read, has another number of lines than there are labels, or a
            path is empty or has an empty part; the message names the line.
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
            f"--category-paths {name} has {len(lines)} lines for {len(labels)} labels; write one path a label"
        )
    paths = tuple(tuple(part.strip() for part in line.split("/")) for line in lines)
    for number, path in enumerate(paths, start=1):
        if not all(path):
            raise InputError(f"--category-paths {name}, line {number}: a part of the path is empty; name it")
    return paths


def check_labels(labels: Sequence[str], where: str) -> Labels:
    """The labels as a tuple.

    Raises:
        InputError: there is none, or one is empty, repeated or no valid text.
    """
    return _checked(labels, f"{where}, label")


def _json_list(text: str, name: str) -> list[str]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--labels {name} is not JSON ({error})") from error
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise InputError(f'--labels {name} must hold a JSON list of strings, such as ["mug", "plate"]')
    return items


def _checked(labels: Sequence[str], where: str) -> Labels:
    if not labels:
        raise InputError(f"{where} 1: there is no label; a classifier needs one for each class")
    first: dict[str, int] = {}
    for number, label in enumerate(labels, start=1):
        if not label.strip():
            raise InputError(f"{where} {number}: the label is empty; each class needs a name")
        if not label.isascii() and label.encode(errors="replace").decode() != label:
            raise InputError(
                f"{where} {number}: {label!r} is no valid text (half of a surrogate pair); correct it"
            )
        if label in first:
            raise InputError(
                f"{where} {number}: {label!r} stands in {first[label]} already; make each label different"
            )
        first[label] = number
    return tuple(labels)


def labels_digest(labels: Sequence[str]) -> str:
    """sha256 over the labels in their order, in lower-case hexadecimal."""
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
