"""report.html of a run: gathered from its committed files, with pictures fetched anew, and written beside them."""

import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from batchcls.config.common import FetchSettings
from batchcls.errors import InputError
from batchcls.images.addresses import resolve_uri
from batchcls.images.policies import decode_limits, fetch_policy
from batchcls.report.run_facts import Failed, Item, RunFacts, Thumbnail
from batchcls.report.run_page import run_page
from batchcls.report.run_reading import read_plan, read_run
from batchcls.report.thumbnails import Source, make_thumbnails
from batchcls.runs.records import RunRecord, read_record
from batchcls.schema import REASONS, Reason, Stage
from batchcls.storage import Storage, explain, join
from batchcls.uris import folder_of

REPORT = "report.html"
THUMBNAIL_SECONDS = 20.0

_logger = logging.getLogger(__name__)


def write_run_report(
    output: str,
    run_id: str,
    storage: Storage,
    *,
    before: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> str:
    """Draw the page of a committed run and write it into the run's folder; a page that is there is replaced.

    Args:
        output: the job's output folder.
        run_id: of the run.
        storage: how to reach it.
        before: id of the run to compare with; None: the one that the gates compared it with.
        storage_options: how images are reached where they are not local; what else fetching needs is in plan.json.

    Returns:
        URI of the page.

    Raises:
        InputError: there is no such run, a file of it is missing, or the store refuses.
    """
    record = read_record(output, run_id, storage)
    earlier = read_record(output, before, storage) if before else _baseline(record, storage)
    facts = read_run(record, earlier, storage)
    thumbnails = _thumbnails(facts, record, read_plan(record, storage), storage_options or {})
    page = run_page(facts, thumbnails, version("batchcls"))
    uri = join(record.folder, REPORT)
    with explain(uri):
        storage.write_whole(uri, page.encode())
    return uri


def report_after_run(
    output: str,
    run_id: str,
    storage: Storage,
    *,
    before: str | None = None,
    storage_options: Mapping[str, object] | None = None,
) -> str | None:
    """The same at the end of a job: what goes wrong is logged, for the run stands without its page.

    Returns:
        URI of the page; None where there is none.
    """
    try:
        return write_run_report(output, run_id, storage, before=before, storage_options=storage_options)
    except Exception as error:  # noqa: BLE001 - committed and judged already: a page undoes neither
        _logger.warning(
            "no report of run %s (%s: %s); draw it with `python -m batchcls.jobs.runs report`",
            run_id,
            type(error).__name__,
            error,
        )
        return None


def _baseline(record: RunRecord, storage: Storage) -> RunRecord | None:
    """The run that this one was judged against; None where there was none, or it is there no more."""
    run_id = record.raw.get("baseline")
    if run_id is None:
        return None
    try:
        return read_record(record.output, str(run_id), storage)
    except InputError as error:
        _logger.warning("the report of run %s compares with nothing: %s", record.run_id, error)
        return None


def _thumbnails(
    facts: RunFacts, record: RunRecord, plan: Mapping[str, Any], storage_options: Mapping[str, object]
) -> dict[int, Thumbnail]:
    """Pictures of the rows on the page, fetched as the job fetched them."""
    config = plan["config"]
    settings = FetchSettings.model_validate(
        {name: config[name] for name in FetchSettings.model_fields if name in config}
        | {"storage_options": dict(storage_options)}
    )
    # Records of early versions lack the base; then their manifests were single files as a rule.
    base = str(record.manifest.get("base") or folder_of(str(record.manifest["uri"])))
    sources: dict[int, Source] = {}
    without: dict[int, Thumbnail] = {}
    for entry in _pictured(facts):
        if entry.uri.start is None:
            without[entry.row] = Thumbnail("", "in the manifest itself")
        elif entry.content_hash is not None and len(entry.uri.start) == entry.uri.length:
            sources.setdefault(entry.row, Source(resolve_uri(entry.uri.start, base), entry.content_hash))
    found = make_thumbnails(sources, fetch_policy(settings), decode_limits(settings), THUMBNAIL_SECONDS)
    return without | found


def _pictured(facts: RunFacts) -> Iterator[Item | Failed]:
    """The rows whose pictures are shown, the most telling first."""
    if facts.changes is not None:
        for flow in facts.changes.flows:
            yield from flow.items
    if facts.confidence is not None:
        yield from facts.confidence.least_sure
    if facts.categories is not None:
        for _, items in facts.categories.examples:
            yield from items
    if facts.confidence is not None:
        yield from facts.confidence.most_sure
    for group in facts.refused:
        # Only what a decoder has gone through without harm is decoded in this process.
        if REASONS[Reason(group.reason)].stage is Stage.PREDICT:
            yield from group.first
