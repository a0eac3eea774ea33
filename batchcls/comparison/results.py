"""Stores each finished measurement in a file, so that a comparison can resume."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from batchcls.comparison.benchmark import BenchmarkResult
from batchcls.comparison.candidates import Candidate
from batchcls.comparison.measurement import Measurement
from batchcls.errors import InputError
from batchcls.storage.documents import Document, DocumentError, UtcTime
from batchcls.storage.filesystem import Storage, explain, join, redact_uri
from batchcls.storage.store_errors import resumable_errors

MEASUREMENTS_FOLDER = "measurements"
_SUFFIX = ".json"
_SHOWN_DIGITS = 12


class StoredMeasurement(Document):
    """Contents of a measurement file."""

    format: Literal["batchcls-measurement"] = Field(
        default="batchcls-measurement", description="Kind of this document."
    )
    created: UtcTime = Field(description="Time of completion, UTC.")
    sample: str = Field(description="Fingerprint of the sample.")
    predictions: tuple[int, ...] = Field(
        description="Top-1 class index of each image; -1 if its logits are not finite."
    )
    notes: tuple[str, ...] = Field(description="Human-readable remarks on the measurement.")
    measurement: Measurement = Field(description="Measured values.")


def measurement_key(candidate: Candidate, sample: str) -> str:
    """Hexadecimal digest of everything that a measurement depends on."""
    environment = candidate.environment
    parts = [
        candidate.bundle_fingerprint,
        str(candidate.choice),
        environment.device,
        environment.hardware.key,
        environment.threads,
        environment.batch_sizes,
        environment.stop_early,
        environment.seconds,
        sample,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class Results:
    """Measurements stored in one output folder."""

    def __init__(self, output: str, sample: str, storage: Storage) -> None:
        """Read the stored measurements.

        Args:
            output: Output folder of the comparison.
            sample: Fingerprint of the sample; all measurements in the folder must use this sample.
            storage: Storage that contains the folder.

        Raises:
            InputError: A file is damaged or was measured on a different sample.
        """
        self._folder = join(output, MEASUREMENTS_FOLDER)
        self._sample = sample
        self._storage = storage
        with explain(self._folder):
            files = storage.list_files(self._folder, _SUFFIX)
        self._stored = {_key(info.uri): _read(info.uri, storage) for info in files}
        self._require_one_sample(output)

    def find(self, candidate: Candidate) -> StoredMeasurement | None:
        """The stored measurement of the candidate, or None."""
        return self._stored.get(measurement_key(candidate, self._sample))

    def uri_of(self, candidate: Candidate) -> str:
        """URI of the file for the measurement of the candidate."""
        return join(self._folder, f"{measurement_key(candidate, self._sample)}{_SUFFIX}")

    def add(self, candidate: Candidate, result: BenchmarkResult) -> StoredMeasurement:
        """Write a measurement to storage.

        Raises:
            InputError: It cannot be written, and the folder contains no other measurements.
            StorageStoppedError: It cannot be written; the measurements stored before are kept.
        """
        stored = StoredMeasurement(
            created=datetime.now(UTC),
            sample=self._sample,
            predictions=result.predictions,
            notes=result.notes,
            measurement=result.measurement,
        )
        uri = self.uri_of(candidate)
        with resumable_errors(uri) if self._stored else explain(uri):
            self._storage.write_atomic(uri, stored.to_json(indent=None))
        self._stored[measurement_key(candidate, self._sample)] = stored
        return stored

    def by_hardware(self) -> Mapping[str, tuple[Measurement, ...]]:
        """Measurements by `Hardware.key`. Only measurements with equal keys may be ranked together."""
        groups: dict[str, list[Measurement]] = {}
        for measurement in newest(self._stored.values()):
            groups.setdefault(measurement.hardware.key, []).append(measurement)
        return {key: tuple(groups[key]) for key in sorted(groups)}

    def _require_one_sample(self, output: str) -> None:
        for stored in self._stored.values():
            if stored.sample != self._sample:
                raise InputError(
                    f"{redact_uri(output)} contains measurements on the sample {stored.sample[:_SHOWN_DIGITS]}, but "
                    f"the manifest, --images and --label-column select the sample {self._sample[:_SHOWN_DIGITS]}; "
                    "results on different images cannot be compared: choose another --output"
                )


def newest(stored: Iterable[StoredMeasurement]) -> list[Measurement]:
    """The measurements in a fixed order; only the newest for equal bundle, engine, device, threads and hardware."""
    latest: dict[tuple[object, ...], Measurement] = {}
    for entry in sorted(stored, key=lambda entry: entry.created):
        measurement = entry.measurement
        key = (
            measurement.bundle_fingerprint,
            measurement.engine,
            measurement.device,
            measurement.threads,
            measurement.hardware.key,
        )
        latest[key] = measurement
    return sorted(latest.values(), key=lambda entry: (entry.model, entry.engine, entry.device, entry.threads))


def _key(uri: str) -> str:
    return uri.rpartition("/")[2].removesuffix(_SUFFIX)


def _read(uri: str, storage: Storage) -> StoredMeasurement:
    with explain(uri):
        data = storage.read_bytes(uri)
    try:
        return StoredMeasurement.from_json(data)
    except DocumentError as error:
        raise InputError(
            f"{redact_uri(uri)} is damaged or was written by another version ({error}); delete it to repeat the "
            "measurement"
        ) from error
