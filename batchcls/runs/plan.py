"""Write plan.json, the first file of a run: its settings, input, model and fingerprints."""

import json
import platform
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from batchcls.config.common_config import JobConfig
from batchcls.errors import InputError
from batchcls.runs.paths import PLAN, run_folder
from batchcls.storage.filesystem import Storage, join, redact_uri


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """Identity of a run: a command resumes an unfinished run only if its fingerprints are equal.

    Attributes:
        manifest: fingerprint of the manifest's files.
        model: fingerprint of the bundle: weights, preprocessing, labels and feature tap.
        settings: the settings that decide which rows and columns are written and what they hold.
    """

    manifest: str
    model: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, config: JobConfig, manifest: str, model: str) -> "Fingerprints":
        """Fingerprints of a command; `settings` are those that its class marks with `ChangesResults`."""
        return cls(manifest, model, config.result_settings())

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Fingerprints":
        """From plan.json. Raises InputError if it is from before there were any."""
        try:
            return cls(str(record["manifest"]), str(record["model"]), dict(record["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"plan.json has no fingerprints that this program can read ({error})") from None

    def as_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {"manifest": self.manifest, "model": self.model, "settings": dict(self.settings)}

    def differences(self, other: "Fingerprints") -> list[str]:
        """What differs in `other`, for people; empty where nothing does."""
        found = []
        if self.manifest != other.manifest:
            found.append(f"the manifest (it was {self.manifest[:12]} and is {other.manifest[:12]})")
        if self.model != other.model:
            found.append(f"the model (it was {self.model[:12]} and is {other.model[:12]})")
        for name in sorted({*self.settings, *other.settings}):
            before, now = self.settings.get(name), other.settings.get(name)
            if before != now:
                found.append(f"--{name.replace('_', '-')} (it was {before} and is {now})")
        return found


def prediction_settings(
    config: JobConfig, model: str, precisions: Iterable[str], decode_margin: float | None
) -> dict[str, Any]:
    """Everything beside the image itself that determines its prediction.

    A run reuses predictions of another run only where these are equal. The engine is left out and its precision is
    included: all engines of one precision are held to the same accuracy tolerance.

    Args:
        config: settings of the job.
        model: fingerprint of the bundle.
        precisions: precisions of the engines on all kinds of nodes.
        decode_margin: as in `LoadSettings`.
    """
    return {
        "model": model,
        "precisions": sorted(set(precisions)),
        "decode_margin": decode_margin,
        **config.result_settings(per_image=True),
    }


_PACKAGES = ("batchcls", "ray", "torch", "torchvision", "timm", "pyarrow", "pillow")


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one run, as it stands in plan.json.

    Attributes:
        run_id: its name.
        config: settings of the command that began it.
        manifest: of what: uri, base of relative uris, fingerprint, rows, files.
        model: with what: fingerprint, architecture, classes, preprocessing, weights.
        placement: shape of the run when it began.
        unpublishable: why it must never be published, empty when it may be.
        fingerprints: decide which later command resumes the run.
        engines: what the network runs with to its end, `settle.Settled.as_json`.
        answers: everything beside an image that determines its prediction, `prediction_settings`.
        reuse: the run whose predictions are reused; empty for none.
    """

    run_id: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    model: dict[str, Any]
    placement: dict[str, Any]
    unpublishable: list[str] = field(default_factory=list)
    fingerprints: Fingerprints | None = None
    engines: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    reuse: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values, with the time and the versions of what runs it."""
        return {
            "format": "batchcls-plan-1",
            "run_id": self.run_id,
            "writer": secrets.token_hex(8),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprints": self.fingerprints.as_json() if self.fingerprints else {},
            "config": self.config,
            "manifest": self.manifest,
            "model": self.model,
            "placement": self.placement,
            "engines": self.engines,
            "answers": self.answers,
            "reuse": self.reuse,
            "unpublishable": self.unpublishable,
            "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        }


def create_plan(plan: Plan, output: str, storage: Storage) -> str:
    """Write plan.json and so take the run's name; returns the URI of its folder.

    Raises:
        InputError: the run id was taken a moment ago.
    """
    folder = run_folder(output, plan.run_id)
    data = json.dumps(plan.as_json(), indent=2).encode()
    try:
        storage.create_exclusive(join(folder, PLAN), data)
    except FileExistsError:
        raise InputError(
            f"{redact_uri(folder)}: another job has just begun a run of this name; start again to see its state"
        ) from None
    return folder
