"""Label maps: their files, what they reject, and the classes, thresholds and paths that follow from them."""

from dataclasses import replace

import numpy as np
import pytest

from batchcls.errors import InputError
from batchcls.models.label_map import LabelMap, LabelSplit, SplitRule, read_label_map
from batchcls.models.mapped_classes import ClassGroups, MappedClasses
from batchcls.models.model_bundle import BundleConfig
from batchcls.storage.filesystem import Storage
from tests.conftest import REPOSITORY
from tests.unit.inference.test_abstention import calibration, config

WHOLE = """
[rename]
c = "see"

[merge]
ab = ["a", "b"]

[retire]
d = ""
e = "c"

[[split.ab.rules]]
to = "ab of men"
column = "department"
values = ["men", "boys"]

[[split.ab.rules]]
to = "ab of women"
column = "title"
pattern = "(?i)wom[ae]n"

[split.ab]
default = "ab"
"""


def read(folder, text: str) -> LabelMap:
    (folder / "map.toml").write_text(text, encoding="utf-8")
    return read_label_map(str(folder / "map.toml"), Storage())


def bundle(labels: str = "abcdef", **changes) -> BundleConfig:
    values = {"labels": tuple(labels), "category_paths": None, "calibration": None} | changes
    return BundleConfig.model_validate(config().model_dump() | values)


def test_all_tables_apply_at_once(tmp_path):
    found = read(tmp_path, WHOLE)
    mapped = MappedClasses.of(bundle(), found)
    assert mapped.config.labels == ("ab", "see", "f")
    assert mapped.groups == ClassGroups(classes=6, merged=((0, 1), (2, 4)), retired=(3,))
    assert found.columns == {"department", "title"}
    targets = {label: sorted(found.targets(label)) for label in "abcdef"}
    parts = ["ab", "ab of men", "ab of women"]
    assert targets == {"a": parts, "b": parts, "c": ["see"], "d": [], "e": ["see"], "f": ["f"]}
    assert (found.sources("ab of men"), found.sources("see")) == ({"a", "b"}, {"c", "e"})
    assert (found.sources("f"), found.sources("d")) == ({"f"}, set())
    assert LabelMap.model_validate_json(found.model_dump_json()) == found


def test_map_of_the_documentation_is_valid(tmp_path):
    page = (REPOSITORY / "docs/how-to/label-map.md").read_text(encoding="utf-8")
    found = read(tmp_path, page.partition("```toml\n")[2].partition("```")[0])
    labels = ("sneakers", "shirt", "blouse", "fax machine", "printer", "gift card", "shoes")
    config = bundle(labels=labels, category_paths=tuple((label,) for label in labels))
    assert MappedClasses.of(config, found).config.labels == ("trainers", "tops", "printer", "shoes")


def test_digest_depends_on_contents_only(tmp_path):
    digests = [
        read(tmp_path, text).digest
        for text in (
            'rename = {a = "x", b = "y"}',
            '# sorted\n[rename]\nb = "y"\na = "x"',
            '[rename]\na = "x"',
        )
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[rename]\nred shoe = 'x'", "is not TOML in UTF-8 .*need quotes"),
        ("[rename]\na = 1979-05-27", "contains a date"),
        ("[rename]\na = 3", "rename.a: Input should be a valid string"),
        ("[renames]\na = 'x'", "renames is not known; there are rename, merge, retire, split"),
        ("[rename]\na = ' '", "a new label is empty"),
        ("[rename]\na = 'x'\n[retire]\na = ''", "a is renamed to x and retired; mention each label once"),
        ("[merge]\nx = ['a', 'b']\n[retire]\na = 'c'", "a is merged into x and retired"),
        ("[merge]\nx = ['a', 'b']\ny = ['b', 'c']", "b is merged into x and merged into y"),
        ("[merge]\nx = ['a', 'a']", "a is merged into x and merged into x"),
        ("[merge]\nx = ['a']", "merge.x needs at least two labels; use rename"),
        ("[retire]\na = 'b'\nb = 'a'", "a is retired in favor of b, which is retired as well"),
        ("[retire]\na = 'a'", "a is retired in favor of a, which is retired as well"),
        ("[rename]\na = 'x'\nb = 'x'", "several labels become x; use merge"),
        ("[rename]\na = 'x'\n[merge]\nx = ['b', 'c']", "several labels become x; use merge"),
        ("[split.a]\nrules = [{to = 'x', column = 'p', values = ['1']}]", "split.a.default: Field required"),
        ("[split.a]\ndefault = 'x'\nrules = []", "split.a.rules: .*at least 1"),
        (
            "[split.a]\ndefault = 'x'\nrules = [{to = 'y', column = 'p'}]",
            "rule 1: give either values or a pattern",
        ),
        (
            "[split.a]\ndefault = 'x'\nrules = [{to = 'y', column = 'p', values = ['1'], pattern = '1'}]",
            "rule 1: give either values or a pattern",
        ),
        (
            "[split.a]\ndefault = 'x'\nrules = [{to = 'y', column = 'p', pattern = '('}]",
            r"\( is not a regular expression",
        ),
        (
            "[split.a]\ndefault = 'x'\nrules = [{to = 'y', column = 'p', value = ['1']}]",
            "split.a: value is not known; there are to, column, values, pattern",
        ),
        (
            "[split]\na = {default = 'x', rules = [{to = 'y', column = 'p', values = ['1']}]}\n"
            "b = {default = 'x', rules = [{to = 'z', column = 'p', values = ['1']}]}",
            "several labels are split into x",
        ),
    ],
)
def test_contradictory_file_is_rejected_with_its_entry(tmp_path, text, message):
    with pytest.raises(InputError, match=rf"^--label-map \S+map\.toml.*{message}"):
        read(tmp_path, text)


def split(*labels: str) -> LabelSplit:
    *others, default = labels
    return LabelSplit(
        default=default, rules=tuple(SplitRule(to=to, column="p", values=(to,)) for to in others)
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (LabelMap(rename={"mugs": "cup"}), "the bundle has no label mugs; did you mean mug?"),
        (
            LabelMap(retire={"mug": "dish"}),
            "the bundle has no label dish; a map names the labels of the bundle",
        ),
        (
            LabelMap(rename={"mug": "plate"}),
            "already has the label plate; add it to the labels that are merged",
        ),
        (LabelMap(merge={"plate": ("mug", "bowl")}), "already has the label plate"),
        (LabelMap(split={"cup": split("x", "y")}), "split.cup: there is no such label after the map"),
        (
            LabelMap(rename={"mug": "cup"}, split={"mug": split("x", "y")}),
            "split.mug: there is no such label",
        ),
        (LabelMap(split={"mug": split("plate", "mug")}), "split.mug: plate is another label"),
        (LabelMap(retire=dict.fromkeys(("mug", "plate", "bowl"), "")), "retires every label"),
        (LabelMap(category_paths={"mug": "kitchen/mug"}), "the bundle has no category paths"),
    ],
)
def test_map_that_does_not_match_the_bundle_is_rejected(found, message):
    with pytest.raises(InputError, match=message):
        MappedClasses.of(bundle(labels=("mug", "plate", "bowl")), found)


def test_labels_may_be_exchanged():
    mapped = MappedClasses.of(bundle(), LabelMap(rename={"a": "b", "b": "a"}))
    assert mapped.config.labels == ("b", "a", "c", "d", "e", "f")
    assert mapped.groups is not None
    assert mapped.groups.digest == ""


def test_probabilities_are_summed_and_those_of_retired_classes_dropped():
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(6), 50).astype(np.float32)
    sums = ClassGroups(classes=6, merged=((0, 4), (2, 3)), retired=(5,)).sum(probabilities)
    expected = [probabilities[:, [0, 4]].sum(1), probabilities[:, 1], probabilities[:, [2, 3]].sum(1)]
    np.testing.assert_array_equal(sums, np.stack(expected, axis=1))
    assert sums.dtype == np.float32
    one = np.array([[0.6, 0.40000004]], np.float32)
    assert ClassGroups(classes=2, merged=((0, 1),)).sum(one).tolist() == [[1.0]]
    assert ClassGroups(classes=2).sum(one) is one


PATHS = (("x", "p", "a"), ("x", "p", "b"), ("x", "q", "c"), ("y", "d"), ("y", "other"), ("z",))


@pytest.mark.parametrize(
    ("found", "paths"),
    [
        (LabelMap(rename={"a": "A", "e": "E"}), {"A": "x/p/A", "E": "y/other", "b": "x/p/b"}),
        (LabelMap(merge={"ab": ("a", "b"), "cd": ("c", "d")}), {"ab": "x/p/ab", "cd": "cd"}),
        (LabelMap(merge={"a": ("a", "c")}), {"a": "x/p/a"}),
        (LabelMap(merge={"abc": ("a", "b", "c")}), {"abc": "x/abc"}),
        (LabelMap(retire={"a": "c", "b": ""}), {"c": "x/q/c", "f": "z"}),
        (LabelMap(rename={"c": "C"}, retire={"a": "c"}), {"C": "x/q/C"}),
        (LabelMap(rename={"a": "A"}, category_paths={"A": "new/place"}), {"A": "new/place"}),
    ],
)
def test_category_paths_follow_their_labels(found, paths):
    mapped = MappedClasses.of(bundle(category_paths=PATHS), found).config
    assert mapped.category_paths is not None
    by_label = dict(zip(mapped.labels, map("/".join, mapped.category_paths), strict=True))
    assert by_label.items() >= paths.items()


def test_new_names_are_paths_if_the_names_of_the_bundle_are():
    labels = ("x/a", "x/b", "y/c")
    config = bundle(labels=labels, category_paths=tuple(tuple(label.split("/")) for label in labels))
    mapped = MappedClasses.of(config, LabelMap(rename={"x/a": "z/w/a"})).config
    assert mapped.category_paths == (("z", "w", "a"), ("x", "b"), ("y", "c"))


@pytest.mark.parametrize(
    ("found", "thresholds", "depths"),
    [
        (LabelMap(rename={"a": "A"}), (0.1, 0.2, 0.3, None, 0.5, 0.6), (0.7, 0.6, 0.5)),
        (LabelMap(merge={"ab": ("b", "a")}), (0.2, 0.3, None, 0.5, 0.6), (0.7, 0.6, 0.5)),
        (LabelMap(merge={"cd": ("c", "d")}), (0.1, 0.2, None, 0.5, 0.6), (0.7, 0.6, 0.5)),
        (LabelMap(retire={"d": "c", "e": ""}), (0.1, 0.2, 0.3, 0.6), (0.7, 0.6, 0.5)),
        (LabelMap(retire=dict.fromkeys("abc", "")), (None, 0.5, 0.6), (0.7, 0.6)),
        (LabelMap(category_paths={"f": "z/y/x/f"}), (0.1, 0.2, 0.3, None, 0.5, 0.6), (0.7, 0.6, 0.5, None)),
    ],
)
def test_thresholds_follow_their_labels(found, thresholds, depths):
    fitted = calibration(thresholds=(0.1, 0.2, 0.3, None, 0.5, 0.6), depth_thresholds=(0.7, 0.6, 0.5))
    config = bundle(category_paths=PATHS, calibration=fitted.model_dump())
    mapped = MappedClasses.of(config, found).config
    assert mapped.calibration is not None
    assert (mapped.calibration.thresholds, mapped.calibration.depth_thresholds) == (thresholds, depths)
    BundleConfig.model_validate(mapped.model_dump())  # which compares their numbers


def test_without_a_map_nothing_changes():
    plain = bundle()
    assert MappedClasses.of(plain, None) == MappedClasses(plain)
    assert (
        replace(MappedClasses.of(plain, LabelMap()), label_map=None, groups=None).config.labels
        == plain.labels
    )
