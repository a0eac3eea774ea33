"""The page of a run: what became of it, what changed since the last one, and what its figures and images are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from batchcls.report.formatting import (
    count,
    difference,
    duration,
    points,
    rate,
    share,
    shown,
    shown_label,
    size,
)
from batchcls.report.html import render_page
from batchcls.report.run_page_data import (
    BINS,
    Category,
    Confidence,
    Failed,
    LabelFlow,
    PredictedRow,
    Refused,
    RunFacts,
    Text,
    Thumbnail,
)
from batchcls.schema import REASONS, Reason
from batchcls.storage.uris import redact_uri

_NO_PICTURE = Thumbnail("", "not fetched")
_LONGEST_LINE = 120


@dataclass(frozen=True, slots=True)
class Card:
    """An image with its id, what is said of it, and where it is, for a pointer that rests on it."""

    image: Thumbnail
    item_id: str
    lines: tuple[str, ...]
    hint: str


@dataclass(frozen=True, slots=True)
class Group:
    """Cards under a heading; `note` says how many rows they stand for, `more` how many are not shown."""

    heading: str
    note: str
    cards: tuple[Card, ...]
    more: str = ""


@dataclass(frozen=True, slots=True)
class FlowGroup:
    """Cards of rows that went from one label to another."""

    before: str
    after: str
    note: str
    cards: tuple[Card, ...]


class Cards:
    """Makes cards; `thumbnails` are images by row number, and a row without one gets an empty box."""

    def __init__(self, thumbnails: Mapping[int, Thumbnail]) -> None:
        self._thumbnails = thumbnails

    def item(self, item: PredictedRow) -> Card:
        """A row with its best label and the one that came next."""
        lines = [f"{item.probability:.3f} {shown_label(item.label)}"]
        if item.runner_up is not None:
            lines.append(f"{item.runner_up[1]:.3f} {shown_label(item.runner_up[0])}")
        image = self._thumbnails.get(item.row, _NO_PICTURE)
        return Card(image, shown(item.item_id), tuple(lines), _hint(item.row, item.uri))

    def items(self, heading: str, items: tuple[PredictedRow, ...], note: str = "") -> Group:
        """Rows under a heading."""
        return Group(heading, note, tuple(self.item(item) for item in items))

    def flow(self, flow: LabelFlow, changed: int) -> FlowGroup:
        """Rows of a flow; `changed` is how many rows changed in all."""
        note = f"{count(flow.rows, 'item')}, {share(flow.rows, changed)} of the changed"
        cards = tuple(self.item(item) for item in flow.items)
        return FlowGroup(shown_label(flow.before), shown_label(flow.after), note, cards)

    def refused(self, group: Refused, rows: int) -> Group:
        """What is in quarantine for one reason; `rows` is the size of the run."""
        reason = Reason(group.reason)
        left = group.rows - len(group.first)
        return Group(
            heading=_words(reason),
            note=f"{count(group.rows, 'row')}, {share(group.rows, rows)}: {REASONS[reason].meaning}",
            cards=tuple(self._failed(entry, reason) for entry in group.first),
            more=f"and {left:,} more" if left else "",
        )

    def _failed(self, entry: Failed, reason: Reason) -> Card:
        known = [] if entry.n_bytes is None else [size(entry.n_bytes)]
        if entry.attempts > 1:
            known.append(f"{entry.attempts} attempts")
        lines = (shown(Text(entry.detail, len(entry.detail)), _LONGEST_LINE), ", ".join(known))
        image = self._thumbnails.get(entry.row, Thumbnail("", _words(reason)))
        said = tuple(line for line in lines if line)
        return Card(image, shown(entry.item_id), said, _hint(entry.row, entry.uri))


def _words(reason: Reason) -> str:
    return reason.value.replace("_", " ")


def _hint(row: int, uri: Text) -> str:
    """Where a row is in the manifest, and where its image is, without credentials."""
    if uri.start is None:
        return f"row {row:,}, the image is in the manifest"
    clean = redact_uri(uri.start)
    length = uri.length if clean == uri.start else len(clean)
    return f"row {row:,}, {shown(Text(clean, length), _LONGEST_LINE)}"


_LONGEST_FACT = 400
_STAGES = {
    "fetch": "fetch, waiting for storage",
    "decode": "decode and resize",
    "predict": "the network",
    "write": "write Parquet",
    "other": "Ray and Python",
    "driver": "the driver",
}


@dataclass(frozen=True, slots=True)
class _RunCard:
    """One of the large numbers at the top; `note` puts it beside another."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Mix:
    """A line of the category mix; bars are in percent of the longest."""

    label: str
    rows: str
    share: str
    before: str
    points: str
    mean: str
    bar: float
    bar_before: float | None


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Heights of the bins in percent of the highest; `line` is the outline of the earlier run's, as an SVG path."""

    bars: tuple[float, ...]
    hints: tuple[str, ...]
    line: str
    highest: str
    note: str


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    milliseconds: str
    busy: str
    bar: float
    resource: str
    limits: bool


def run_page(facts: RunFacts, thumbnails: Mapping[int, Thumbnail], version: str) -> str:
    """One HTML file that needs no network, no other file and no script.

    Args:
        facts: all that is shown.
        thumbnails: images of the rows in it, by row number; a row without one gets an empty box.
        version: of batchcls.
    """
    cards = Cards(thumbnails)
    changes, confidence, categories = facts.changes, facts.confidence, facts.categories
    flows = () if changes is None else changes.flows
    examples = () if categories is None else categories.examples
    return render_page(
        "run.html",
        title=f"Run {facts.run_id}",
        version=version,
        facts=facts,
        committed=f"{facts.committed:%-d %B %Y, %H:%M %Z}".strip(),
        figures=_figures(facts),
        churn=_churn(facts),
        flows=[cards.flow(flow, changes.changed) for flow in flows] if changes else [],
        more_flows=changes.flow_count - len(flows) if changes else 0,
        mixes=_mixes(facts),
        histogram=None if confidence is None else _histogram(confidence),
        ends=(
            ()
            if confidence is None
            else (
                cards.items("Least sure", confidence.least_sure),
                cards.items("Most sure", confidence.most_sure),
            )
        ),
        examples=[
            cards.items(shown_label(entry.label), items, count(entry.rows, "row"))
            for entry, items in examples
        ],
        quarantine=[cards.refused(group, facts.rows) for group in facts.refused],
        stages=_stages(facts),
        speed=_speed(facts),
        about=[(name, shown(Text(value, len(value)), _LONGEST_FACT)) for name, value in facts.facts],
    )


def _figures(facts: RunFacts) -> list[_RunCard]:
    before, quarantined = facts.before, facts.quarantined
    found = [
        _RunCard("rows", f"{facts.rows:,}", f"{difference(facts.rows, before.rows)} rows" if before else ""),
        _RunCard("answered now", f"{facts.predicted:,}", share(facts.predicted, facts.rows)),
    ]
    if facts.reused:
        found.append(_RunCard("reused", f"{facts.reused:,}", share(facts.reused, facts.rows)))
    was = f", {share(before.quarantined, before.rows)} before" if before else ""
    found.append(_RunCard("in quarantine", f"{quarantined:,}", share(quarantined, facts.rows) + was))
    if facts.changes is not None:
        both = facts.changes.same + facts.changes.changed
        changed = facts.changes.changed
        found.append(_RunCard("labels changed", f"{changed:,}", share(changed, both) if both else ""))
    if facts.throughput is not None:
        was = (
            ""
            if not before or before.images_per_second is None
            else f"{rate(before.images_per_second)} before"
        )
        found.append(_RunCard("images a second", rate(facts.throughput.images_per_second), was))
        found.append(_RunCard("whole job", duration(facts.throughput.total_seconds)))
    return found


def _churn(facts: RunFacts) -> list[_RunCard]:
    changes = facts.changes
    if changes is None:
        return []
    both = changes.same + changes.changed
    found = [
        _RunCard("same label", f"{changes.same:,}", f"{share(changes.same, both)} of those in both runs"),
        _RunCard(
            "another label", f"{changes.changed:,}", f"{share(changes.changed, both)} of those in both runs"
        ),
        _RunCard("new", f"{changes.new:,}", "answered in this run only"),
        _RunCard("gone", f"{changes.gone:,}", f"answered in {changes.run_id} only"),
    ]
    why = [_RunCard("of these", f"{rows:,}", cause) for cause, rows in changes.causes]
    return [*found[:2], *why, *found[2:]]


def _mixes(facts: RunFacts) -> list[tuple[str, str, list[_Mix]]]:
    """The tables of the category mix: caption, what is left out, lines."""
    categories = facts.categories
    if categories is None:
        return []
    now, before = categories.predictions, categories.predictions_before

    def lines(entries: Sequence[Category]) -> list[_Mix]:
        shares = [_shares(entry, now, before) for entry in entries]
        longest = max((max(mine, old or 0.0) for mine, old in shares), default=0.0) or 1.0
        return [
            _Mix(
                label=shown_label(entry.label),
                rows=f"{entry.rows:,}",
                share=share(entry.rows, now),
                before="" if old is None or before is None else share(entry.rows_before or 0, before),
                points="" if old is None else points(mine, old),
                mean="-" if entry.mean_probability is None else f"{entry.mean_probability:.3f}",
                bar=round(100 * mine / longest, 2),
                bar_before=None if old is None else round(100 * old / longest, 2),
            )
            for entry, (mine, old) in zip(entries, shares, strict=True)
        ]

    left = categories.count - len(categories.largest)
    found = [("Largest categories", f"and {left:,} more" if left else "", lines(categories.largest))]
    if categories.moved:
        found.append(("Largest shifts", "", lines(categories.moved)))
    return found


def _shares(entry: Category, now: int, before: int | None) -> tuple[float, float | None]:
    return entry.rows / now, None if not before else (entry.rows_before or 0) / before


def _histogram(confidence: Confidence) -> _Histogram:
    shares = _normalized(confidence.bins)
    before = None if confidence.bins_before is None else _normalized(confidence.bins_before)
    highest = max(*shares, *(before or ())) or 1.0
    note = f"mean {confidence.mean:.3f}"
    if confidence.mean_before is not None:
        note += f", {confidence.mean_before:.3f} before"
    edges = [edge / BINS for edge in range(BINS + 1)]
    return _Histogram(
        bars=tuple(round(100 * value / highest, 2) for value in shares),
        hints=tuple(
            f"{low:.2f} to {high:.2f}: {count(rows, 'row')}"
            for (low, high), rows in zip(pairwise(edges), confidence.bins, strict=True)
        ),
        line="" if before is None else _outline([100 * value / highest for value in before]),
        highest=f"{100 * highest:.1f} %",
        note=note,
    )


def _normalized(bins: Sequence[int]) -> list[float]:
    total = sum(bins) or 1
    return [rows / total for rows in bins]


def _outline(heights: Sequence[float]) -> str:
    """The upper edge of bars as an SVG path in a box of 100 x 100, y downwards."""
    width = 100 / len(heights)
    steps = [f"V{100 - height:.2f}H{(index + 1) * width:g}" for index, height in enumerate(heights)]
    return f"M0 100{''.join(steps)}V100"


def _stages(facts: RunFacts) -> list[_Stage]:
    if facts.throughput is None:
        return []
    return [
        _Stage(
            name=_STAGES.get(stage.stage, stage.stage),
            milliseconds=f"{stage.milliseconds:.2f}",
            busy=f"{stage.utilization:.0%}".replace("%", " %"),
            bar=round(min(100.0, 100 * stage.utilization), 1),
            resource=f"of {stage.capacity:g} {stage.resource}",
            limits=stage.stage == facts.throughput.limited_by,
        )
        for stage in facts.throughput.stages
    ]


def _speed(facts: RunFacts) -> str:
    """The bottleneck in a sentence."""
    found = facts.throughput
    if found is None:
        return ""
    start = f"{rate(found.after_start)} images a second after {duration(found.start_seconds)} of start-up"
    if not found.ideal:
        return f"{start}; no stage took any time."
    return (
        f"{start}, which is {share(found.after_start, found.ideal)} of the {rate(found.ideal)} that the scarcest "
        f"resource would allow. Limited by {_STAGES.get(found.limited_by, found.limited_by)}."
    )
