"""The label map of `--label-map`: how the classes of a bundle become the labels of a taxonomy.

All labels in a map are those of the bundle, and its tables apply at the same time: classes are renamed, merged and
retired, and the result is split by columns of the manifest. `mapped_classes` applies a map to a bundle.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError

from batchcls.errors import InputError
from batchcls.models.model_bundle import sha256_hex
from batchcls.storage.documents import StoredRecord
from batchcls.storage.filesystem import Storage, explain, redact_uri


class SplitRule(StoredRecord):
    """A condition on a column of the manifest; a null matches no rule.

    Attributes:
        to: label of the rows that match.
        column: name of the column: `item_id`, `uri` or one of `--keep`.
        values: matching values; None with a pattern.
        pattern: regular expression (RE2) that occurs in matching values; None with values.
    """

    to: str
    column: str
    values: tuple[str, ...] | None = None
    pattern: str | None = None


class LabelSplit(StoredRecord):
    """The labels into which a label is split: that of the first rule that matches a row, or the default."""

    default: str
    rules: tuple[SplitRule, ...] = Field(min_length=1)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, each once, in the order of the rules; the default is the last one."""
        return tuple(dict.fromkeys([*(rule.to for rule in self.rules), self.default]))


class LabelMap(StoredRecord):
    """How labels of a bundle become labels of a taxonomy; a label that no table mentions stays as it is.

    Attributes:
        rename: new name of a label.
        merge: labels whose probabilities are summed, by the name of the merged label.
        retire: label that replaces a retired one and gets its probability; empty if no label does.
        split: how rows of a label are split, by the label after the other tables.
        category_paths: path a/b/c in the category tree, by the label after the other tables.
    """

    rename: dict[str, str] = Field(default_factory=dict)
    merge: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    retire: dict[str, str] = Field(default_factory=dict)
    split: dict[str, LabelSplit] = Field(default_factory=dict)
    category_paths: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the contents; comments and the order of entries have no effect on it."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        return sha256_hex(json.dumps(values, sort_keys=True).encode())

    @property
    def columns(self) -> frozenset[str]:
        """Columns of the manifest that the rules of splits read."""
        return frozenset(rule.column for split in self.split.values() for rule in split.rules)

    def mentioned(self) -> Iterator[str]:
        """Yield the labels of the bundle that are renamed, merged or retired."""
        yield from self.rename
        for members in self.merge.values():
            yield from members
        yield from self.retire

    def unsplit(self, label: str) -> str | None:
        """The label before splits of a label of the bundle; None if it is retired without a replacement."""
        if label in self.retire:
            label = self.retire[label]
            if not label:
                return None
        merged = next((new for new, members in self.merge.items() if label in members), label)
        return self.rename.get(label, merged)

    def targets(self, label: str) -> frozenset[str]:
        """The labels that rows of a label of the bundle may have after the map; empty if it is retired."""
        target = self.unsplit(label)
        if target is None:
            return frozenset()
        return frozenset(self.split[target].labels) if target in self.split else frozenset([target])

    def sources(self, label: str) -> frozenset[str]:
        """The labels of the bundle from which a label of rows after the map may stem."""
        whole = self.split_of(label) or label
        mentioned = frozenset(self.mentioned())
        found = {source for source in mentioned if self.unsplit(source) == whole}
        # A bundle never has the label that a rename or a merge adds, and keeps any other label under its name.
        added = {*self.rename.values(), *self.merge}
        return frozenset(found | ({whole} - mentioned - added))

    def split_of(self, label: str) -> str | None:
        """The label that was split into this one; None if it does not stem from a split."""
        return next((whole for whole, split in self.split.items() if label in split.labels), None)


def read_label_map(uri: str, storage: Storage) -> LabelMap:
    """Read a label map from a TOML file.

    Raises:
        InputError: the file cannot be read, is not TOML or contradicts itself; the message names the entry.
    """
    name = f"--label-map {redact_uri(uri)}"
    with explain(uri):
        data = storage.read_bytes(uri)
    try:
        # Records are validated as JSON, in which a list is a tuple.
        text = json.dumps(tomllib.loads(data.decode("utf-8-sig")))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{name} is not TOML in UTF-8 ({error}); labels with spaces need quotes") from None
    except TypeError:
        raise InputError(f"{name} contains a date or a time; put labels and values in quotes") from None
    try:
        found = LabelMap.model_validate_json(text)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InputError(f"{name}: {'; '.join(problems)}") from None
    problem = next(_problems(found), None)
    if problem is not None:
        raise InputError(f"{name}: {problem}")
    return found


def _problems(found: LabelMap) -> Iterator[str]:
    """Yield what is wrong with a map, whatever the labels of the bundle are."""
    yield from _unknown_keys(found)
    yield from _blank_labels(found)
    uses = Counter(found.mentioned())
    for label in (label for label, count in uses.items() if count > 1):
        ways = [
            *(f"renamed to {found.rename[label]}" for _ in range(label in found.rename)),
            *(
                f"merged into {new}"
                for new, members in found.merge.items()
                for member in members
                if member == label
            ),
            *("retired" for _ in range(label in found.retire)),
        ]
        yield f"{label} is {' and '.join(ways)}; mention each label once"
    for new, members in found.merge.items():
        if len(members) < 2:
            yield f"merge.{new} needs at least two labels; use rename for one"
    for label, replacement in found.retire.items():
        if replacement in found.retire:
            yield (
                f"{label} is retired in favor of {replacement}, which is retired as well; name the label that remains"
            )
    names = Counter([*found.rename.values(), *found.merge])
    for name in (name for name, count in names.items() if count > 1):
        yield f"several labels become {name}; use merge"
    yield from _split_problems(found)


def _split_problems(found: LabelMap) -> Iterator[str]:
    for label, split in found.split.items():
        for number, rule in enumerate(split.rules, start=1):
            where = f"split.{label}, rule {number}"
            if (rule.values is None) == (rule.pattern is None):
                yield f"{where}: give either values or a pattern"
            if rule.pattern is not None:
                try:
                    pc.match_substring_regex(pa.array([""]), pattern=rule.pattern)
                except pa.ArrowInvalid as error:
                    yield f"{where}: {rule.pattern} is not a regular expression ({error})"
    parts = Counter(label for split in found.split.values() for label in split.labels)
    for label in (label for label, count in parts.items() if count > 1):
        yield f"several labels are split into {label}; split them into different ones, or merge them"


def _unknown_keys(found: LabelMap) -> Iterator[str]:
    # A record keeps unknown keys, which a later version may have written; a user has mistyped them.
    records: list[tuple[str, StoredRecord]] = [("", found)]
    for label, split in found.split.items():
        records += [(f"split.{label}: ", record) for record in (split, *split.rules)]
    for where, record in records:
        for key in record.model_extra or ():
            known = ", ".join(type(record).model_fields)
            yield f"{where}{key} is not known; there are {known}"


def _blank_labels(found: LabelMap) -> Iterator[str]:
    new = [
        *found.rename.values(),
        *found.merge,
        *(label for split in found.split.values() for label in split.labels),
    ]
    if not all(label.strip() for label in new):
        yield "a new label is empty"
