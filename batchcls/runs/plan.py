"""plan.json: what a run was asked to do, of which input and with which model; written first."""

import json
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from batchcls.errors import InputError
from batchcls.runs.layout import PLAN, RUN, run_folder
from batchcls.storage import Storage, join, redact_uri

_PACKAGES = ("batchcls", "ray", "torch", "torchvision", "timm", "pyarrow", "pillow")


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one run, as it stands in plan.json.

    `unpublishable` says why the run must never be published; empty when it may be.
    """

    run_id: str
    config: dict[str, Any]
    manifest: dict[str, Any]
    model: dict[str, Any]
    placement: dict[str, Any]
    unpublishable: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values, with the time and the versions of what runs it."""
        return {
            "format": "batchcls-plan-1",
            "run_id": self.run_id,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self.config,
            "manifest": self.manifest,
            "model": self.model,
            "placement": self.placement,
            "unpublishable": self.unpublishable,
            "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        }


def claim(plan: Plan, output: str, storage: Storage) -> str:
    """Write plan.json and so take the run's folder; returns its URI.

    Raises:
        InputError: the run id is taken.
    """
    folder = run_folder(output, plan.run_id)
    data = json.dumps(plan.as_json(), indent=2).encode()
    try:
        storage.create_exclusive(join(folder, PLAN), data)
    except FileExistsError:
        state = "is committed" if storage.exists(join(folder, RUN)) else "was begun and not committed"
        raise InputError(
            f"run {plan.run_id} {state} in {redact_uri(folder)}; choose another --run-id or leave it out"
        ) from None
    return folder
