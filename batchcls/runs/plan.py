"""plan.json: what a run was asked to do, of which input and with which model; written first."""

import json
import platform
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from batchcls.errors import InputError
from batchcls.runs.fingerprints import Fingerprints
from batchcls.runs.layout import PLAN, run_folder
from batchcls.storage import Storage, join, redact_uri

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
        fingerprints: say which later command goes on with it.
        engines: what the network runs with to its end, `settle.Settled.as_json`.
        answers: all that an image's answer follows from beside the image, `fingerprints.answers_of`.
        reuse: whose answers are taken over; empty: nobody's.
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


def claim(plan: Plan, output: str, storage: Storage) -> str:
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
