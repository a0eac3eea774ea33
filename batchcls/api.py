"""The Python API: classify a catalog from a notebook or a workflow task, and read the results of a run.

`batchcls classify` calls the same functions, so both write the same files. Messages are logged by the logger
`batchcls`; configure logging to see them.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console

from batchcls.cli.arguments import validate_settings
from batchcls.cli.console import PlainConsole, messages_console
from batchcls.config.classify_config import ClassifyConfig
from batchcls.config.common_config import FetchSettings
from batchcls.errors import BatchclsError, InputError, PublishRefused
from batchcls.runs.catalog import open_parts, read_current, read_record, report_of
from batchcls.runs.records import Counts, GateResult, Kind, RunRecord
from batchcls.runs.run_refs import PUBLISHED, resolve_run
from batchcls.storage.filesystem import Storage, join
from batchcls.storage.uris import normalize_uri

if TYPE_CHECKING:
    import pyarrow.dataset as ds

    from batchcls.jobs.classify_run import CommittedRun


@dataclass(frozen=True)
class Run:
    """A committed run: its files, its row counts and a reader for its rows.

    Attributes:
        output: output folder of the job, a path or URI.
        run_id: name of the run.
        folder: URI of the run's folder.
        committed: time of the commit, in UTC.
        counts: rows of the manifest by outcome: those with a prediction by its origin, and quarantined ones by reason.
        gates: results of the publish gates.
        published: whether this is the published run of `output`.
        unpublishable: reasons why the run can never be published, such as random weights; empty if it can be.
        prediction_files: URIs of the Parquet files with one row per predicted item.
        quarantine_files: URIs of the Parquet files with one row per item that could not be predicted.
        report: URI of report.html; None if there is none.
        error: why the run was not published although this was requested; None otherwise.
    """

    output: str
    run_id: str
    folder: str
    committed: datetime
    counts: Counts
    gates: tuple[GateResult, ...] = field(repr=False)
    published: bool
    unpublishable: tuple[str, ...]
    prediction_files: tuple[str, ...] = field(repr=False)
    quarantine_files: tuple[str, ...] = field(repr=False)
    report: str | None = None
    error: BatchclsError | None = None
    _record: RunRecord = field(kw_only=True, repr=False)
    _storage: Storage = field(kw_only=True, repr=False)

    def predictions(self) -> "ds.Dataset":
        """The predictions as a PyArrow dataset, which reads rows only on demand.

        The columns are listed in the reference of output tables: among them `item_id`, `label`, `probability`,
        `top_k` and `embedding`. For example:

            run.predictions().to_table(columns=["item_id", "label", "probability"]).to_pandas()
            run.predictions().head(10)

        Raises:
            InputError: a file of the run is missing or cannot be read.
        """
        return open_parts(self._record, "predictions", self._storage)

    def quarantine(self) -> "ds.Dataset":
        """The quarantined items with `reason` and `detail`, as a PyArrow dataset.

        Raises:
            InputError: a file of the run is missing or cannot be read.
        """
        return open_parts(self._record, "quarantine", self._storage)


def classify(
    manifest: str | os.PathLike[str],
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    show_progress: bool = True,
    **settings: Any,
) -> Run:
    """Classify the images of a manifest, and publish the run if its gates pass.

    Calling it again with the same arguments resumes a run that was interrupted. If this process is connected to Ray
    already, that connection is used and left open; otherwise Ray is joined or started, and shut down at the end.

    Args:
        manifest: Parquet file, folder or glob, local or s3://, with the columns `item_id` and `uri` or `image`.
        model: folder of a bundle (local or s3://), a name from the model zoo, timm:NAME or torchvision:NAME.
        output: folder of the runs, local or s3://.
        show_progress: show a progress bar, or progress lines in the log if there is no terminal.
        **settings: any flag of `batchcls classify`, with underscores: `top_k=3`, `publish=False`, `keep=["price"]`.

    Returns:
        The committed run.

    Raises:
        InputError: a setting or an input is wrong; nothing was written.
        PublishRefused: the run is committed, but a gate failed; the run that was published before still is. The
            attribute `run` of the exception is the committed run.
        BudgetExceeded: more rows failed than allowed; the run is not committed.
        StorageStoppedError: storage failed; calling it again resumes the run.
        BatchclsError: any other failure, as in `batchcls.errors`.
    """
    paths = {"manifest": manifest, "model": model, "output": output}
    config = validate_settings(
        ClassifyConfig, {name: _text(name, path) for name, path in paths.items()} | settings, name=str
    )
    run = run_classify(config, messages_console() if show_progress else PlainConsole(quiet=True))
    if isinstance(run.error, PublishRefused):
        run.error.run = run
    if run.error is not None:
        raise run.error
    return run


def run_classify(
    config: ClassifyConfig, console: Console, on_commit: Callable[["CommittedRun"], None] | None = None
) -> Run:
    """Run the classify job; the command line and `classify` both call this.

    Args:
        config: settings of the job.
        console: shows the progress.
        on_commit: called once the run is committed, before it is published.

    Returns:
        The committed run. If it was not published although this was requested, `error` has the reason.

    Raises:
        BatchclsError: the run was not committed; subclasses as in `classify`.
    """
    # Ray takes a second to import, which readers of a run do not need.
    from batchcls.jobs.classify_run import commit_run, publish_run  # noqa: PLC0415

    committed = commit_run(config, console)
    if on_commit is not None:
        on_commit(committed)
    outcome = publish_run(config, committed)
    return _run(
        committed.record,
        committed.storage,
        gates=outcome.decision.gates,
        published=outcome.published,
        report=outcome.report,
        error=outcome.error,
    )


def open_run(
    output: str | os.PathLike[str],
    run: str = PUBLISHED,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Open a committed run for reading.

    Args:
        output: folder of the runs, local or s3://.
        run: `published`, `previous` (published before it), `latest`, a run id or an unambiguous prefix of one.
        storage_options: options of the storage client, as `--storage-options` takes them.

    Raises:
        InputError: there is no such run, it is damaged, or storage denies access.
    """
    settings = validate_settings(FetchSettings, {"storage_options": dict(storage_options or {})}, name=str)
    folder, storage = normalize_uri(_text("output", output)), Storage(settings.storage_options)
    record = read_record(folder, resolve_run(run, folder, storage), storage)
    return _run(
        record,
        storage,
        gates=record.gates,
        published=read_current(folder, storage) == record.run_id,
        report=report_of(record, storage),
    )


def _text(name: str, path: object) -> str:
    """A path as text. Raises InputError if it is none."""
    if isinstance(path, str | os.PathLike):
        return str(os.fspath(path))
    raise InputError(f"{name}: a path or URI is required, not {type(path).__name__}")


def _run(
    record: RunRecord,
    storage: Storage,
    *,
    gates: tuple[GateResult, ...],
    published: bool,
    report: str | None = None,
    error: BatchclsError | None = None,
) -> Run:
    def uris(kind: Kind) -> tuple[str, ...]:
        return tuple(join(record.folder, file.path) for file in record.files if file.kind == kind)

    return Run(
        output=record.output,
        run_id=record.run_id,
        folder=record.folder,
        committed=record.committed,
        counts=record.counts,
        gates=gates,
        published=published,
        unpublishable=record.unpublishable,
        prediction_files=uris("predictions"),
        quarantine_files=uris("quarantine"),
        report=report,
        error=error,
        _record=record,
        _storage=storage,
    )
