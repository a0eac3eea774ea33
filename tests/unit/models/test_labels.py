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
def test_a_text_file_has_one_label_a_line(tmp_path, data):
    assert _read(tmp_path, data.encode()) == ("mug", "Tasse für Tee", "plate")


def test_a_json_file_holds_a_list(tmp_path):
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
def test_a_file_that_cannot_name_classes_is_refused_with_the_place(tmp_path, data, name, message):
    with pytest.raises(InputError, match=message):
        _read(tmp_path, data, name)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: there is no such file"):
        read_labels(str(tmp_path / "none.txt"), Storage())


def test_labels_from_elsewhere_are_held_to_the_same_rules():
    assert check_labels(["a", "b"], "bundle.json") == ("a", "b")
    with pytest.raises(InputError, match=r"bundle\.json, label 2: 'a' is a duplicate of 1"):
        check_labels(["a", "a"], "bundle.json")


def test_a_name_of_several_classes_gets_its_identifier_and_others_stay():
    names = disambiguate(["crane", "robin", "crane"], ["n02012849", "n01558993", "n03126707"])
    assert names == ("crane (n02012849)", "robin", "crane (n03126707)")


def test_imagenet_has_a_thousand_different_names_in_the_order_of_wnids():
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
def test_public_label_sets_have_a_different_name_for_each_class(classes):
    labels = known_labels(classes)
    assert len(labels) == len(set(labels)) == classes


@pytest.mark.parametrize("classes", [1, 10, 999, 1001])
def test_other_counts_of_classes_have_no_known_labels(classes):
    assert known_labels(classes) is None


def test_half_of_a_surrogate_pair_is_no_label(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('["mug", "\\ud83d\\ude00", "\\ud800"]')
    with pytest.raises(InputError, match=r"item 3: .*not valid Unicode"):
        read_labels(str(path), Storage())
