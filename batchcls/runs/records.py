"""Documents of a run on storage: run.json, current.json, and the markers next to them.

plan.json is in `plan`, a receipt in `parts`, the holder of a lease in `lease`.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from batchcls.inference.engine_record import EngineSelectionRecord
from batchcls.models.cascade_record import CascadeThresholds
from batchcls.models.classifier_head import ModelLayers
from batchcls.models.label_map import LabelMap
from batchcls.models.mapped_classes import ClassGroups
from batchcls.models.model_bundle import WeightsOrigin
from batchcls.preprocessing import Preprocessing
from batchcls.resources import NodeResources
from batchcls.runs.bottleneck import Bottleneck
from batchcls.runs.paths import run_folder
from batchcls.storage.documents import Count, Document, FolderName, RelativePath, StoredRecord, UtcTime

HISTOGRAM_BINS = 20
"""Number of equal-width bins over 0..1 in a confidence histogram; 1.0 is in the last."""

Kind = Literal["predictions", "quarantine"]
"""What the rows of a file are."""

RecordedSettings = dict[str, JsonValue]
"""Settings by name, as JSON values; `JobConfig.from_recorded` reads them."""


class ManifestInfo(StoredRecord):
    """The manifest of a run.

    Attributes:
        uri: URI without credentials.
        base: folder or URL that relative image URIs refer to.
        fingerprint: digest of the names, sizes and versions of its files.
        rows, files: numbers of rows and files.
    """

    uri: str | None = None
    base: str | None = None
    fingerprint: str | None = None
    rows: Count | None = None
    files: Count | None = None


class CascadeInfo(StoredRecord):
    """The large network of a cascade, and the confidences of the small one below which it predicts.

    Attributes:
        small, large: fingerprints of the bundles.
        layers: fingerprints of the parts of the large one.
        source, architecture, preprocessing, weights: of the large one.
        thresholds: confidences by label of the bundles.
        expected_fraction: share of the rows that the large network was expected to predict; None without an estimate.
    """

    small: str
    large: str
    layers: ModelLayers
    source: str | None = None
    architecture: str | None = None
    preprocessing: Preprocessing | None = None
    weights: WeightsOrigin | None = None
    thresholds: CascadeThresholds
    expected_fraction: float | None = None


class ModelInfo(StoredRecord):
    """The model of a run; of a cascade, this is the small network.

    Attributes:
        fingerprint: of the bundle, or of both bundles of a cascade; empty if it is not recorded.
        layers: fingerprints of its parts; None if they are not recorded.
        source, architecture: library and name of the architecture.
        classes: number of labels, after the label map.
        label_map: `--label-map`; None without one.
        groups: sums of probabilities of the classes of the bundle; None without a label map.
        preprocessing, embedding_tap, weights: as in the bundle.
        cascade: the large network; None without `--cascade`.
    """

    fingerprint: str = ""
    layers: ModelLayers | None = None
    source: str | None = None
    architecture: str | None = None
    classes: Count = 0
    label_map: LabelMap | None = None
    groups: ClassGroups | None = None
    preprocessing: Preprocessing | None = None
    embedding_tap: str | None = None
    weights: WeightsOrigin | None = None
    cascade: CascadeInfo | None = None

    @property
    def architectures(self) -> str:
        """Name of the architecture, or of those of both networks of a cascade; empty if it is not recorded."""
        names = [self.architecture, *([] if self.cascade is None else [self.cascade.architecture])]
        return " + ".join(name for name in names if name)

    def cascade_change(self, before: "ModelInfo") -> str:
        """What differs from the cascade of an earlier run, apart from its small network; empty if nothing does."""
        old, new = before.cascade, self.cascade
        if old is None or new is None:
            return "" if old is new else "number of networks (--cascade)"
        # Labels are those of the small network, which are compared with its other parts.
        if old.layers.model_copy(update={"labels": new.layers.labels}) != new.layers:
            return "large network of the cascade"
        return "" if old.thresholds == new.thresholds else "set of thresholds of the cascade"


class Counts(StoredRecord):
    """Rows of a run by outcome: `rows` is the sum of `with_prediction` and `quarantined`.

    Attributes:
        rows: rows of the manifest.
        predicted: rows whose predictions were computed from their images.
        reused: rows whose predictions were copied from another run.
        reheaded: rows whose predictions were computed from the embeddings of another run.
        shared: rows whose predictions were copied from other rows with the same images.
        abstained: rows with a prediction, of any origin, but without a label.
        by_network: rows with a prediction, of any origin, by the network of a cascade; empty without one.
        quarantined, quarantined_by_reason: rows without a prediction.
    """

    rows: Count
    predicted: Count
    reused: Count = 0
    reheaded: Count = 0
    shared: Count = 0
    abstained: Count = 0
    by_network: dict[str, Count] = Field(default_factory=dict)
    quarantined: Count
    quarantined_by_reason: dict[str, Count] = Field(default_factory=dict)

    @property
    def by_origin(self) -> dict[str, int]:
        """Rows with a prediction by `parts.Origin`, with every origin."""
        return {
            "computed": self.predicted,
            "reused": self.reused,
            "reheaded": self.reheaded,
            "shared": self.shared,
        }

    @property
    def with_prediction(self) -> int:
        """Rows with a prediction of any origin."""
        return sum(self.by_origin.values())


class RunFile(StoredRecord):
    """One Parquet file of a run.

    Attributes:
        path: relative to the folder of the run.
        kind: what its rows are.
        rows: number of rows.
        bytes: size of the file.
        digest: SHA-256 of the file, hex.
    """

    path: RelativePath
    kind: Kind
    rows: Count
    bytes: Count
    digest: str


class WorkerRows(StoredRecord):
    """Rows that one engine on one node processed, quarantined rows included.

    Attributes:
        node: Ray's id of the node; empty outside of Ray.
        host: host name of the node.
        engine, precision, device: of the network.
        rows: number of rows.
        model: network of a cascade; empty without one.
    """

    node: str
    host: str
    engine: str
    precision: str
    device: str
    rows: Count
    model: str = ""


def add_workers(workers: Iterable[WorkerRows]) -> tuple[WorkerRows, ...]:
    """Add up the rows of each engine on each node; sorted by host, node, network and engine."""
    first: dict[tuple[str, ...], WorkerRows] = {}
    rows: Counter[tuple[str, ...]] = Counter()
    for worker in workers:
        key = (worker.host, worker.node, worker.model, worker.engine, worker.precision, worker.device)
        first.setdefault(key, worker)
        rows[key] += worker.rows
    return tuple(first[key].model_copy(update={"rows": count}) for key, count in sorted(rows.items()))


class GateResult(StoredRecord):
    """The result of one gate.

    Attributes:
        gate: name of the gate.
        value, limit: None if the gate could not be evaluated; such a gate has passed.
        passed: whether the gate passed.
        message: a sentence that compares value and limit.
    """

    gate: str
    value: float | None
    limit: float | None
    passed: bool
    message: str


class EmbeddingStatistics(StoredRecord):
    """Euclidean norms of the embeddings of a run.

    Embeddings with NaN or infinity are counted in `non_finite` and excluded from the other values.
    """

    dimension: Count
    rows: Count
    mean_norm: float
    std_norm: float
    non_finite: Count


def _largest_deviation(values: dict[str, Any]) -> float | None:
    """The largest standard deviation that values in 0..1 with this mean can have (Bhatia and Davis, 2000)."""
    mean = values.get("mean_confidence")
    return None if mean is None else math.sqrt(max(0.0, mean * (1 - mean)))


class Summary(StoredRecord):
    """Statistics of the predictions of a run.

    Attributes:
        predictions: number of rows with a prediction of any origin.
        categories: rows by label, the most frequent first; rows without a label (abstained) have the empty label.
        mean_confidence: mean probability of the top-1 class, 0..1; None without predictions.
        std_confidence: its standard deviation; if it is not recorded, the largest possible one.
        confidence_histogram: rows by confidence in `HISTOGRAM_BINS` bins.
        embeddings: None if the run has no embeddings.
    """

    predictions: Count
    categories: dict[str, Count]
    mean_confidence: float | None
    std_confidence: float | None = Field(default_factory=_largest_deviation)
    confidence_histogram: Annotated[
        tuple[Count, ...], Field(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)
    ]
    embeddings: EmbeddingStatistics | None = None


class RunHardware(StoredRecord):
    """The nodes that a run used, and the platform of the driver."""

    nodes: tuple[NodeResources, ...] = ()
    driver: str = ""


class Measurements(StoredRecord):
    """Times and rates of the session that finished a run; fields of a pipeline that had no rows to process are None.

    Attributes:
        rows_pipeline: number of rows that this session processed.
        seconds_pipeline: from the start of the workers until the last row was written.
        images_per_second: average over the whole pipeline.
        engines: number of actors by engine.
        peak_memory_mib_of_an_actor, peak_memory_mib_of_the_driver: resident memory.
        hardware: of the cluster.
        seconds_to_first_part: from the start of the job until the first part was on storage.
        bottleneck: what limited the pipeline.
        seconds_total: from the start of the job until the commit.
        decode_margin: as in `LoadSettings`.
        engine_selections: the measurements from which the engines were selected, one for each kind of node.
    """

    rows_pipeline: Count = 0
    seconds_pipeline: float | None = None
    images_per_second: float | None = None
    engines: dict[str, Count] = Field(default_factory=dict)
    peak_memory_mib_of_an_actor: float | None = None
    peak_memory_mib_of_the_driver: float | None = None
    hardware: RunHardware = RunHardware()
    seconds_to_first_part: float | None = None
    bottleneck: Bottleneck | None = None
    seconds_total: float | None = None
    decode_margin: float | None = None
    engine_selections: tuple[EngineSelectionRecord, ...] = ()


class Findings(StoredRecord):
    """The part of run.json that is measured or evaluated before the commit.

    Attributes:
        measurements: of the session that finished the run.
        summary: of the predictions; None if the gates were not evaluated.
        baseline: the published run that the gates compared with; None without one.
        gates: results in the order of evaluation.
    """

    measurements: Measurements = Measurements()
    summary: Summary | None = None
    baseline: FolderName | None = None
    gates: tuple[GateResult, ...] = ()


class RunRecord(Document):
    """run.json: a committed run.

    Attributes:
        run_id: name of the run.
        writer: random digits, by which the driver recognizes its own file.
        committed: time of the commit.
        manifest, model: input and model of the run.
        result_settings: everything besides image and model that determines a prediction, `plan.prediction_settings`.
        unpublishable: reasons why the run must not be published; empty if it may be.
        counts: rows by outcome.
        stage_seconds: busy seconds by stage, summed over all workers.
        image_bytes: bytes of images that were fetched.
        workers: rows by node and engine; reused rows are not counted.
        measurements, summary, baseline, gates: as in `Findings`.
        files: all files of the run; other files in the folder are not part of it.
        output: output folder from which the record was read; not in the file.
    """

    format: Literal["batchcls-run"] = "batchcls-run"
    run_id: FolderName
    writer: str = ""
    committed: UtcTime
    manifest: ManifestInfo
    model: ModelInfo
    result_settings: RecordedSettings = Field(default_factory=dict)
    unpublishable: tuple[str, ...] = ()
    counts: Counts
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    image_bytes: Count = 0
    workers: tuple[WorkerRows, ...] = ()
    measurements: Measurements = Measurements()
    summary: Summary | None = None
    baseline: FolderName | None = None
    gates: tuple[GateResult, ...] = ()
    files: tuple[RunFile, ...]
    output: str = Field(default="", exclude=True)

    @property
    def folder(self) -> str:
        """URI of the folder of the run, to which the paths of `files` are relative."""
        return run_folder(self.output, self.run_id)


class PublishHistoryEntry(StoredRecord):
    """A run that was published before.

    Attributes:
        run_id: name of the run.
        published, replaced: the time in which readers may have opened it.
        withdrawn: a rollback replaced it, so the next rollback goes further back.
    """

    run_id: FolderName
    published: UtcTime
    replaced: UtcTime
    withdrawn: bool


class CurrentRecord(Document):
    """current.json: the published run, and the runs that were published before, the latest first."""

    format: Literal["batchcls-current"] = "batchcls-current"
    run_id: FolderName
    path: RelativePath
    published: UtcTime
    previous: FolderName | None = None
    history: tuple[PublishHistoryEntry, ...] = ()


class ReuseMarker(Document):
    """reused.json: the predictions of run `run_id` are copied into `rows` rows of this run."""

    format: Literal["batchcls-reused"] = "batchcls-reused"
    run_id: FolderName
    rows: Count


class ReaderRequest(Document):
    """readers/NAME.json: a reader asks to keep the run until a time."""

    until: UtcTime


class RemovalMark(Document):
    """removal.json: `batchcls runs prune` is about to remove the run, or has removed parts of it."""

    format: Literal["batchcls-removal"] = "batchcls-removal"
