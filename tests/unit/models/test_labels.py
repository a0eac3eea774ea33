import json

import pytest
from timm.data import ImageNetInfo

from batchcls.errors import InputError
from batchcls.models.imagenet_labels import disambiguate, imagenet_labels, known_labels
from batchcls.models.labels import check_labels, read_labels
from batchcls.storage.filesystem import Storage


def _read(folder, data: bytes, name: str = "labels.txt") -> tuple[str, ...]:
    (folder / name).write_bytes(data)
    return read_labels(str(folder / name), Storage())


@pytest.mark.parametrize(
    "data",
    ["mug\nTasse für Tee\nplate", "mug\nTasse für Tee\nplate\n", "\ufeffmug\r\n Tasse für Tee \r\nplate\r\n"],
    ids=["bare", "final newline", "Windows"],
)
def test_text_file_has_one_label_per_line(tmp_path, data):
    assert _read(tmp_path, data.encode()) == ("mug", "Tasse für Tee", "plate")


def test_json_file_contains_a_list(tmp_path):
    assert _read(tmp_path, json.dumps(["mug", "a\nb"]).encode(), "labels.json") == ("mug", "a\nb")


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"mug\nplate\nmug\n", "l.txt", r"l\.txt, line 3: 'mug' is a duplicate of 1"),
        (b"mug\n\nplate\n", "l.txt", r"l\.txt, line 2: the label is empty"),
        (b"", "l.txt", "there are no labels"),
        (b"caf\xe9\n", "l.txt", "not UTF-8"),
        (b'["mug", " "]', "l.json", r"l\.json, item 2: the label is empty"),
        (b'["mug", "mug"]', "l.json", r"l\.json, item 2: 'mug' is a duplicate of 1"),
        (b'{"0": "mug"}', "l.json", "must contain a JSON list of strings"),
        (b'["mug", 3]', "l.json", "must contain a JSON list of strings"),
        (b'["mug"', "l.json", "is not JSON"),
    ],
)
def test_invalid_label_file_is_rejected_with_position(tmp_path, data, name, message):
    with pytest.raises(InputError, match=message):
        _read(tmp_path, data, name)


def test_missing_file_is_rejected_by_name(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: there is no such file"):
        read_labels(str(tmp_path / "none.txt"), Storage())


def test_check_labels_applies_the_same_rules():
    assert check_labels(["a", "b"], "bundle.json") == ("a", "b")
    with pytest.raises(InputError, match=r"bundle\.json, label 2: 'a' is a duplicate of 1"):
        check_labels(["a", "a"], "bundle.json")


def test_ambiguous_names_get_their_identifiers():
    names = disambiguate(["crane", "robin", "crane"], ["n02012849", "n01558993", "n03126707"])
    assert names == ("crane (n02012849)", "robin", "crane (n03126707)")


def test_imagenet_labels_are_unique_and_ordered_by_wnid():
    labels, wnids = imagenet_labels(), ImageNetInfo().label_names()
    assert len(labels) == len(set(labels)) == 1000
    assert wnids == sorted(wnids)
    assert (labels[0], labels[134], labels[517], labels[999]) == (
        "tench",
        "crane bird",
        "crane",
        "toilet tissue",
    )


@pytest.mark.parametrize("classes", [1000, 11_221, 11_821, 21_841, 21_842, 21_843])
def test_public_label_sets_have_unique_names(classes):
    labels = known_labels(classes)
    assert len(labels) == len(set(labels)) == classes


@pytest.mark.parametrize("classes", [1, 10, 999, 1001])
def test_other_numbers_of_classes_have_no_known_labels(classes):
    assert known_labels(classes) is None


def test_unpaired_surrogate_is_rejected(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('["mug", "\\ud83d\\ude00", "\\ud800"]')
    with pytest.raises(InputError, match=r"item 3: .*not valid Unicode"):
        read_labels(str(path), Storage())
