"""plan.json, the first file of a run: its settings, input, model and fingerprints."""

import platform
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Literal

from pydantic import Field, JsonValue

from batchcls.config.common_config import JobConfig
from batchcls.errors import InputError
from batchcls.inference.engine_record import EngineSelectionRecord
from batchcls.models.label_map import LabelMap
from batchcls.resources import ResourcePlan
from batchcls.runs.paths import PLAN, run_folder
from batchcls.runs.records import ManifestInfo, ModelInfo, RecordedSettings, WorkerRows
from batchcls.schema import LARGE
from batchcls.storage.documents import Count, Document, FolderName, StoredRecord, UtcTime
from batchcls.storage.filesystem import Storage, join, redact_uri


class Fingerprints(StoredRecord):
    """Identity of a run: a command resumes an unfinished run only if its fingerprints are equal.

    Attributes:
        manifest: fingerprint of the manifest's files.
        model: fingerprint of the bundle: weights, preprocessing, labels and feature tap; of a cascade, of both bundles.
        settings: the settings that determine the rows, columns and values of the output.
        label_map: digest of the label map; empty without one.
    """

    manifest: str
    model: str
    settings: RecordedSettings
    label_map: str = ""

    @classmethod
    def of(
        cls, config: JobConfig, manifest: str, model: str, label_map: LabelMap | None = None
    ) -> "Fingerprints":
        """Fingerprints of a command; `settings` are those that its class marks with `ChangesResults`."""
        digest = "" if label_map is None else label_map.digest
        return cls(manifest=manifest, model=model, settings=config.result_settings(), label_map=digest)

    def differences(self, other: "Fingerprints") -> list[str]:
        """Human-readable list of the differences from `other`; empty if they are equal."""
        found = []
        if self.manifest != other.manifest:
            found.append(f"the manifest (it was {self.manifest[:12]} and is {other.manifest[:12]})")
        if self.model != other.model:
            found.append(f"the model (it was {self.model[:12]} and is {other.model[:12]})")
        if self.label_map != other.label_map:
            maps = (self.label_map[:12] or "none", other.label_map[:12] or "none")
            found.append(f"the label map (it was {maps[0]} and is {maps[1]})")
        for name in sorted({*self.settings, *other.settings}):
            before, now = self.settings.get(name), other.settings.get(name)
            if before != now:
                found.append(f"--{name.replace('_', '-')} (it was {before} and is {now})")
        return found


def prediction_settings(
    config: JobConfig,
    precisions: Iterable[str],
    decode_margin: float | None,
    large_precisions: Iterable[str] | None = None,
) -> RecordedSettings:
    """Everything besides the image and the model that determines a prediction.

    `reuse_decision` compares them with those of another run. The engine is left out and its precision is included: all
    engines of one precision are held to the same accuracy tolerance.

    Args:
        config: settings of the job.
        precisions: precisions of the engines on all kinds of nodes.
        decode_margin: as in `LoadSettings`.
        large_precisions: precisions of the large network of a cascade; None without one.
    """
    large = {} if large_precisions is None else {"large_precisions": sorted(set(large_precisions))}
    return {
        "precisions": sorted(set(precisions)),
        **large,
        "decode_margin": decode_margin,
        **config.result_settings(per_image=True),
    }


def with_used_precisions(settings: RecordedSettings, workers: Iterable[WorkerRows]) -> RecordedSettings:
    """Return `prediction_settings` with the precisions of all engines that predicted a row.

    A kind of node that joins a run has no measured engine, so that its precision may not be among the planned ones.
    A later run must not take its rows for rows of the planned precisions.
    """
    used: dict[str, set[str]] = {}
    for worker in workers:
        used.setdefault("large_precisions" if worker.model == LARGE else "precisions", set()).add(
            worker.precision
        )
    for name, precisions in used.items():
        planned = settings.get(name)
        if isinstance(planned, list) and not precisions <= set(planned):
            both: list[JsonValue] = [*sorted({*map(str, planned), *precisions})]
            settings = settings | {name: both}
    return settings


ReuseMethod = Literal["copy", "relabel", "rehead"]
"""How predictions follow from those of another run: unchanged, with other labels, or from its embeddings."""


class HeadAgreement(StoredRecord):
    """Stored predictions compared with those that the head of their run computes from their stored embeddings.

    Attributes:
        rows: compared rows.
        top1_agreement: share of them with the same best class, 0..1.
        max_probability_difference: largest difference of the probability of the stored best class.
    """

    rows: Count
    top1_agreement: float
    max_probability_difference: float


class PlannedReuse(StoredRecord):
    """The run whose predictions are reused.

    Attributes:
        run_id: name of the run.
        by_row: all its predictions are valid, without comparing images.
        method: how the predictions follow from those of the run.
        agreement: measured before `rehead` was planned; None for the other methods.
    """

    run_id: FolderName
    by_row: bool
    method: ReuseMethod = "copy"
    agreement: HeadAgreement | None = None


class RecordedEngines(StoredRecord):
    """The engines with which a run started; a resumed run uses the same.

    Attributes:
        selections: the measurements of each kind of node whose engine was measured.
        large: the same for the large network of a cascade; empty without one.
        decode_margin: as in `LoadSettings`.
    """

    selections: tuple[EngineSelectionRecord, ...] = ()
    large: tuple[EngineSelectionRecord, ...] = ()
    decode_margin: float | None = None


_PACKAGES = ("batchcls", "ray", "torch", "torchvision", "timm", "pyarrow", "pillow")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


class Plan(Document):
    """plan.json: a run that has been started.

    Attributes:
        format: distinguishes a run of this program from other folders.
        run_id: name of the run.
        writer: random digits, by which the driver recognizes its own file.
        created: time of the start: after the manifest was opened, so it dates the state of the manifest.
        fingerprints: decide which later command resumes the run.
        config: settings of the command that started it, without credentials.
        manifest, model: input and model of the run.
        resources: numbers of actors and tasks at the start; None if they are not recorded.
        engines: the engines of the run until its end.
        result_settings: `prediction_settings`.
        reuse: the run whose predictions are reused; None: all rows are computed.
        unpublishable: reasons why the run must not be published; empty if it may be.
        versions: of the packages.
    """

    format: Literal["batchcls-plan"] = "batchcls-plan"
    run_id: FolderName
    writer: str = Field(default_factory=lambda: secrets.token_hex(8))
    created: UtcTime = Field(default_factory=_now)
    fingerprints: Fingerprints
    config: RecordedSettings = Field(default_factory=dict)
    manifest: ManifestInfo
    model: ModelInfo
    resources: ResourcePlan | None = None
    engines: RecordedEngines = RecordedEngines()
    result_settings: RecordedSettings = Field(default_factory=dict)
    reuse: PlannedReuse | None = None
    unpublishable: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=_versions)


def create_plan(plan: Plan, output: str, storage: Storage) -> str:
    """Write plan.json, which reserves the name of the run; returns the URI of its folder.

    Raises:
        InputError: another job has created a run of this name.
    """
    folder = run_folder(output, plan.run_id)
    try:
        storage.create_exclusive(join(folder, PLAN), plan.to_json())
    except FileExistsError:
        raise InputError(
            f"{redact_uri(folder)}: another job has just started a run of this name; run the command again to see "
            "its state"
        ) from None
    return folder
