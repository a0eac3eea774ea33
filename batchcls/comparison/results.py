"""Stores finished measurements in one file each, so that a comparison can resume."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, ValidationError

from batchcls.comparison.benchmark import BenchmarkResult
from batchcls.comparison.candidates import Candidate
from batchcls.comparison.measurement import Measurement, Record
from batchcls.errors import InputError
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors

MEASUREMENTS_FOLDER = "measurements"
_SUFFIX = ".json"
_SHOWN_DIGITS = 12


class Finished(Record):
    """The contents of a file: a measurement, and what it was made from."""

    format: Literal["batchcls-measurement-1"] = Field(
        default="batchcls-measurement-1", description="Version of this record."
    )
    created: datetime = Field(description="When it was finished, UTC.")
    sample: str = Field(description="Fingerprint of the sample of images.")
    answers: tuple[int, ...] = Field(
        description="Best class of each image; -1 where the answer is no number."
    )
    notes: tuple[str, ...] = Field(description="What a person should know of how it was measured.")
    measurement: Measurement = Field(description="The figures.")


def key_of(candidate: Candidate, sample: str) -> str:
    """What a measurement depends on, as hexadecimal digits: the same for the same candidate and sample."""
    place = candidate.place
    parts = [
        candidate.bundle_fingerprint,
        str(candidate.choice),
        place.device,
        place.hardware.key,
        place.threads,
        place.batch_sizes,
        place.worthwhile_only,
        place.seconds,
        sample,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class Results:
    """The measurements of one output folder."""

    def __init__(self, output: str, sample: str, storage: Storage) -> None:
        """Read what is there.

        Args:
            output: the folder of the comparison.
            sample: fingerprint of the sample that everything in it has to be measured on.
            storage: how to reach it.

        Raises:
            InputError: a file is damaged or was measured on other images.
        """
        self._folder = join(output, MEASUREMENTS_FOLDER)
        self._sample = sample
        self._storage = storage
        with explain(self._folder):
            files = storage.list_files(self._folder, _SUFFIX)
        self._finished = {_key(info.uri): _read(info.uri, storage) for info in files}
        self._require_one_sample(output)

    def find(self, candidate: Candidate) -> Finished | None:
        """The candidate's measurement, of this run or an earlier one."""
        return self._finished.get(key_of(candidate, self._sample))

    def uri_of(self, candidate: Candidate) -> str:
        """Where the candidate's measurement is kept."""
        return join(self._folder, f"{key_of(candidate, self._sample)}{_SUFFIX}")

    def add(self, candidate: Candidate, measured: BenchmarkResult) -> Finished:
        """Keep a measurement, on storage when this returns.

        Raises:
            InputError: it cannot be written, and none was before.
            StorageStoppedError: it cannot be written; what was measured before is kept.
        """
        finished = Finished(
            created=datetime.now(UTC),
            sample=self._sample,
            answers=measured.answers,
            notes=measured.notes,
            measurement=measured.measurement,
        )
        uri = self.uri_of(candidate)
        with resumable_errors(uri) if self._finished else explain(uri):
            self._storage.write_atomic(uri, f"{finished.model_dump_json()}\n".encode())
        self._finished[key_of(candidate, self._sample)] = finished
        return finished

    def by_hardware(self) -> Mapping[str, tuple[Measurement, ...]]:
        """Measurements to be ranked against each other, by `Hardware.key`; those of two kinds never meet."""
        kinds: dict[str, list[Measurement]] = {}
        for measurement in newest(self._finished.values()):
            kinds.setdefault(measurement.hardware.key, []).append(measurement)
        return {key: tuple(kinds[key]) for key in sorted(kinds)}

    def _require_one_sample(self, output: str) -> None:
        for finished in self._finished.values():
            if finished.sample != self._sample:
                raise InputError(
                    f"{redact_uri(output)} holds measurements on the sample {finished.sample[:_SHOWN_DIGITS]}, the "
                    f"manifest, --images and --label-column give the sample {self._sample[:_SHOWN_DIGITS]}; figures "
                    "of different images are not compared: choose another --output"
                )


def newest(finished: Iterable[Finished]) -> list[Measurement]:
    """The measurements in a fixed order; of several with equal bundle, engine and place, the newest."""
    latest: dict[tuple[object, ...], Measurement] = {}
    for entry in sorted(finished, key=lambda entry: entry.created):
        found = entry.measurement
        latest[found.bundle_fingerprint, found.engine, found.device, found.threads, found.hardware.key] = (
            found
        )
    return sorted(latest.values(), key=lambda found: (found.model, found.engine, found.device, found.threads))


def _key(uri: str) -> str:
    return uri.rpartition("/")[2].removesuffix(_SUFFIX)


def _read(uri: str, storage: Storage) -> Finished:
    with explain(uri):
        data = storage.read_bytes(uri)
    try:
        return Finished.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            f"{redact_uri(uri)} is damaged or of another version ({error.error_count()} fields do not fit); delete "
            "it to repeat the measurement"
        ) from error
