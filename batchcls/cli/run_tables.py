"""Builds the tables of the `runs` commands. Catalog strings are escaped and truncated."""

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from batchcls.cli.console import printable
from batchcls.runs.catalog import ListedRun, State
from batchcls.runs.diff import CAUSES, STATUSES, RunDiff
from batchcls.runs.prune import PruneDecision
from batchcls.runs.records import HISTOGRAM_BINS, Counts, RunRecord, Summary
from batchcls.schema import NO_LABEL_TEXT

_MAX_WIDTH = 60
_MAX_CATEGORIES = 10
_BARS = " ▁▂▃▄▅▆▇█"


def cell_text(text: object, width: int = _MAX_WIDTH) -> Text:
    """Catalog text for a table cell: one line, truncated to `width` characters."""
    line = printable(str(text)[: width + 1])
    return Text(line if len(line) <= width else f"{line[: width - 1]}…")


def runs_table(runs: Sequence[ListedRun], published: str | None, previous: str | None) -> Table:
    """Table with one row per run. `*` marks the published run, `<` the run that a rollback would publish."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "run", "state", "created"):
        table.add_column(name, no_wrap=True)
    for name in ("rows", "failed", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    for run in runs:
        mark = "*" if run.run_id == published else "<" if run.run_id == previous else ""
        when = f"{run.created:%Y-%m-%d %H:%M}" if run.created else "-"
        style = "bold" if mark == "*" else "red" if run.state is State.DAMAGED else None
        table.add_row(mark, cell_text(run.run_id), _state(run), when, *_figures(run), style=style)
    return table


def facts_table(facts: Mapping[str, object]) -> Table:
    """Table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, cell_text(value, 200))
    return table


def run_facts(record: RunRecord, published: str | None) -> dict[str, object]:
    """The most important properties of a run by name."""
    counts, rate, files = record.counts, record.measurements.images_per_second, record.manifest.files
    return {
        "run": record.run_id,
        "published": "yes" if record.run_id == published else "no",
        "not publishable because": "; ".join(record.unpublishable) or "-",
        "committed": f"{record.committed:%Y-%m-%d %H:%M:%S %Z}",
        "manifest": f"{record.manifest.uri or '-'}, {'?' if files is None else files} files",
        "model": f"{record.model.architectures or '-'}, fingerprint {record.model.fingerprint[:12]}",
        "rows": f"{counts.rows}: {_origins(counts)}, {counts.quarantined} failed",
        "files": f"{len(record.files)}, {sum(file.bytes for file in record.files) / 2**20:.1f} MiB",
        "images/s": "-" if rate is None else f"{rate:.1f}",
        "folder": record.folder,
    }


def _origins(counts: Counts) -> str:
    """Rows with a prediction by origin."""
    reheaded = f", {counts.reheaded} reheaded" if counts.reheaded else ""
    shared = f", {counts.shared} shared" if counts.shared else ""
    networks = "".join(f", {rows} by the {network} network" for network, rows in counts.by_network.items())
    return f"{counts.predicted} predicted, {counts.reused} reused{reheaded}{shared}{networks}"


def categories_table(summary: Summary, before: Summary | None = None) -> Table:
    """Table of the largest categories or, compared with another run, of those whose share changed most."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("category")
    for name in ("items", "share", *(("before", "change") if before else ())):
        table.add_column(name, justify="right", no_wrap=True)
    for label, new, old in _largest(summary, before):
        cells = [str(summary.categories.get(label, 0)), f"{new:.2%}"]
        cells += [f"{old:.2%}", f"{new - old:+.2%}"] if before else []
        table.add_row(cell_text(label), *cells)
    return table


def confidence_line(name: str, summary: Summary) -> str:
    """The mean confidence and its histogram from 0 to 1."""
    mean = "-" if summary.mean_confidence is None else f"{summary.mean_confidence:.3f}"
    highest = max(1, *summary.confidence_histogram)
    bars = "".join(_BARS[-(-count * (len(_BARS) - 1) // highest)] for count in summary.confidence_histogram)
    return f"confidence {name}: mean {mean}, 0 |{bars}| 1 in {HISTOGRAM_BINS} bins"


def statuses_table(found: RunDiff) -> Table:
    """Table of item counts by status, with changed labels by cause."""
    table = Table("items", "", "meaning", box=None, pad_edge=False, header_style="bold")
    for name, meaning in STATUSES.items():
        table.add_row(name.replace("_", " "), str(found.statuses[name]), meaning)
        if name == "changed":
            for cause, why in CAUSES.items():
                table.add_row(f"  by {cause.replace('_', ' ')}", str(found.causes[cause]), why)
    return table


def flows_table(found: RunDiff) -> Table:
    """Table of the most frequent label changes."""
    table = Table("from", "to", box=None, pad_edge=False, header_style="bold")
    for name in ("items", "image", "model", "both", "neither", "map", "confidence"):
        table.add_column(name, justify="right", no_wrap=True)
    for flow in found.flows:
        causes = (flow.by_image, flow.by_model, flow.by_image_and_model, flow.by_neither, flow.by_label_map)
        confidence = f"{flow.old_probability:.2f} -> {flow.new_probability:.2f}"
        table.add_row(
            *(
                cell_text(NO_LABEL_TEXT if label is None else label, 40)
                for label in (flow.old_label, flow.new_label)
            ),
            str(flow.items),
            *map(str, causes),
            confidence,
        )
    return table


def prune_table(decisions: Iterable[PruneDecision]) -> Table:
    """Table of all runs with the planned action and the reason to keep a run."""
    table = Table("run", "state", "action", "reason", box=None, pad_edge=False, header_style="bold")
    for decision in decisions:
        kept = decision.kept_because
        action, reason = ("delete", "") if kept is None else ("keep", kept)
        table.add_row(
            cell_text(decision.run.run_id), decision.run.state.value, action, cell_text(reason, 100)
        )
    return table


def _state(run: ListedRun) -> str:
    gate_failed = run.record is not None and any(not gate.passed for gate in run.record.gates)
    if run.record is not None and run.record.unpublishable:
        return "committed (dry run)"
    return "committed (gate failed)" if gate_failed else run.state.value


def _figures(run: ListedRun) -> tuple[str, str, str, Text]:
    if run.record is None:
        return "-", "-", "-", cell_text(run.detail, 80)
    counts, rate = run.record.counts, run.record.measurements.images_per_second
    model = f"{run.record.model.architectures} {run.record.model.fingerprint[:12]}"
    return str(counts.rows), str(counts.quarantined), "-" if rate is None else f"{rate:.1f}", cell_text(model)


def _largest(summary: Summary, before: Summary | None) -> list[tuple[str, float, float]]:
    """Labels with their current and previous share."""
    new, old = summary.categories, before.categories if before else {}
    rows, rows_before = max(1, summary.predictions), max(1, before.predictions if before else 0)
    shares = [
        (label, new.get(label, 0) / rows, old.get(label, 0) / rows_before)
        for label in new.keys() | old.keys()
    ]
    rank = (lambda row: (-abs(row[1] - row[2]), row[0])) if before else (lambda row: (-row[1], row[0]))
    return sorted(shares, key=rank)[:_MAX_CATEGORIES]
