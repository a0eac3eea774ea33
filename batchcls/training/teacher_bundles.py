"""Opens the teachers of a distillation and matches their classes to the categories of the student, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchcls.errors import InputError
from batchcls.models.labels import Labels
from batchcls.models.model_bundle import CONFIG_FILE, Bundle, BundleConfig
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.training.categories import format_names


@dataclass(frozen=True, slots=True)
class TeacherBundle:
    """A teacher of a distillation.

    Attributes:
        bundle: its bundle.
        classes: for each category of the student, in order, its class index in the teacher.
    """

    bundle: Bundle
    classes: tuple[int, ...]

    def lineage(self) -> dict[str, Any]:
        """Return what the bundle of the student records of its teacher, as JSON values."""
        return {
            "fingerprint": self.bundle.fingerprint,
            "model": str(self.bundle.config.spec),
            "weights": self.bundle.config.weights.model_dump(mode="json"),
        }


def open_teachers(uris: Sequence[str], labels: Labels, storage: Storage) -> tuple[TeacherBundle, ...]:
    """Read the bundles of teachers for a student with these categories.

    Raises:
        InputError: a bundle does not exist, is not trained, or lacks a category; the message names the remedy.
    """
    teachers = []
    for uri in uris:
        classes = _classes(uri, _read_record(uri, storage), labels)
        teachers.append(TeacherBundle(Bundle.load(uri, storage), classes))
    return tuple(teachers)


def check_teachers(uris: Sequence[str], labels: Labels, storage: Storage) -> None:
    """Check the records of teachers, before PyTorch and a cluster are started.

    Raises:
        InputError: as `open_teachers`.
    """
    for uri in uris:
        _classes(uri, _read_record(uri, storage), labels)


def _read_record(uri: str, storage: Storage) -> BundleConfig:
    with explain(uri):
        exists = storage.exists(join(uri, CONFIG_FILE))
    if not exists:
        raise InputError(
            f"--teacher {redact_uri(uri)}: there is no bundle, because the folder contains no {CONFIG_FILE}; train one "
            "with `batchcls finetune`, and pass its --output"
        )
    record = Bundle.read_config(uri, storage)
    if record.untrained_head or record.weights.kind == "random":
        raise InputError(
            f"--teacher {redact_uri(uri)}: this bundle is not trained; train it with `batchcls finetune` first"
        )
    return record


def _classes(uri: str, record: BundleConfig, labels: Labels) -> tuple[int, ...]:
    """Return the class index in the teacher of each label."""
    index_of = {label: index for index, label in enumerate(record.labels)}
    missing = [label for label in labels if label not in index_of]
    if missing:
        raise InputError(
            f"--teacher {redact_uri(uri)} lacks {len(missing)} of the {len(labels)} categories of the student: "
            f"{format_names(missing)}; fine-tune the teacher on these categories, or omit it"
        )
    return tuple(index_of[label] for label in labels)
