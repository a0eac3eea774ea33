"""Renders report.html of a run: publish status, gates, changes since the baseline run, confidence and throughput."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isinf

from batchcls.report.formatting import (
    count,
    difference,
    display_label,
    display_text,
    duration,
    percentage_points,
    rate,
    share,
    size,
)
from batchcls.report.html import render_page
from batchcls.report.run_page_data import (
    BINS,
    Category,
    Confidence,
    LabelFlow,
    PredictedRow,
    QuarantinedRow,
    QuarantineGroup,
    RunFacts,
    Text,
    Thumbnail,
)
from batchcls.runs.bottleneck import Bottleneck
from batchcls.runs.records import GateResult
from batchcls.runs.utilization import Stage
from batchcls.schema import LARGE, REASONS, Reason
from batchcls.storage.uris import redact_uri

_NO_IMAGE = Thumbnail("", "not fetched")
_MAX_LINE_LENGTH = 120


@dataclass(frozen=True, slots=True)
class Card:
    """A thumbnail with the item ID, description lines and a tooltip that locates the image."""

    image: Thumbnail
    item_id: str
    lines: tuple[str, ...]
    hint: str


@dataclass(frozen=True, slots=True)
class Group:
    """Cards under a heading. `note` states the number of rows they represent, `more` the number not shown."""

    heading: str
    note: str
    cards: tuple[Card, ...]
    more: str = ""


@dataclass(frozen=True, slots=True)
class FlowGroup:
    """Cards of rows whose label changed from `before` to `after`."""

    before: str
    after: str
    note: str
    cards: tuple[Card, ...]


class Cards:
    """Builds cards. `thumbnails` maps row numbers to images; a row without one gets a placeholder."""

    def __init__(self, thumbnails: Mapping[int, Thumbnail]) -> None:
        self._thumbnails = thumbnails

    def item(self, item: PredictedRow) -> Card:
        """The card of a row with its predicted label and the runner-up."""
        lines = [f"{item.probability:.3f} {display_label(item.label)}"]
        if item.runner_up is not None:
            lines.append(f"{item.runner_up[1]:.3f} {display_label(item.runner_up[0])}")
        image = self._thumbnails.get(item.row, _NO_IMAGE)
        return Card(image, display_text(item.item_id), tuple(lines), _hint(item.row, item.uri))

    def items(self, heading: str, items: tuple[PredictedRow, ...], note: str = "") -> Group:
        """The cards of `items` under a heading."""
        return Group(heading, note, tuple(self.item(item) for item in items))

    def flow(self, flow: LabelFlow, changed: int) -> FlowGroup:
        """The cards of a label change; `changed` is the total number of changed rows."""
        note = f"{count(flow.rows, 'item')}, {share(flow.rows, changed)} of all label changes"
        cards = tuple(self.item(item) for item in flow.items)
        return FlowGroup(display_label(flow.before), display_label(flow.after), note, cards)

    def quarantined(self, group: QuarantineGroup, rows: int) -> Group:
        """The cards of one quarantine reason; `rows` is the number of rows of the run."""
        reason = Reason(group.reason)
        hidden = group.rows - len(group.first)
        return Group(
            heading=_words(reason),
            note=f"{count(group.rows, 'row')}, {share(group.rows, rows)}: {REASONS[reason].meaning}",
            cards=tuple(self._quarantined_row(entry, reason) for entry in group.first),
            more=f"and {hidden:,} more" if hidden else "",
        )

    def _quarantined_row(self, entry: QuarantinedRow, reason: Reason) -> Card:
        details = [] if entry.n_bytes is None else [size(entry.n_bytes)]
        if entry.attempts > 1:
            details.append(f"{entry.attempts} attempts")
        lines = (display_text(Text(entry.detail, len(entry.detail)), _MAX_LINE_LENGTH), ", ".join(details))
        image = self._thumbnails.get(entry.row, Thumbnail("", _words(reason)))
        text = tuple(line for line in lines if line)
        return Card(image, display_text(entry.item_id), text, _hint(entry.row, entry.uri))


def _words(reason: Reason) -> str:
    return reason.value.replace("_", " ")


def _hint(row: int, uri: Text) -> str:
    """The row number and the URI of the image, without credentials."""
    if uri.start is None:
        return f"row {row:,}, image stored in the manifest"
    clean = redact_uri(uri.start)
    length = uri.length if clean == uri.start else len(clean)
    return f"row {row:,}, {display_text(Text(clean, length), _MAX_LINE_LENGTH)}"


_MAX_FACT_LENGTH = 400
_STAGES = {
    "fetch": "fetch (waiting for storage)",
    "decode": "decode and resize",
    "predict": "inference",
    "predict_large": "inference, large network",
    "write": "write Parquet",
    "other": "Ray and Python",
    "driver": "driver",
}


@dataclass(frozen=True, slots=True)
class _RunCard:
    """One of the headline numbers; `note` puts it in relation to another number."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class _MixRow:
    """A row of the category mix; bar lengths are percentages of the longest bar."""

    label: str
    rows: str
    share: str
    before: str
    change: str
    mean: str
    bar: float
    bar_before: float | None


@dataclass(frozen=True, slots=True)
class _Histogram:
    """Bin heights in percent of the highest; `line` is the SVG path of the baseline run's outline."""

    bars: tuple[float, ...]
    hints: tuple[str, ...]
    line: str
    highest: str
    note: str


@dataclass(frozen=True, slots=True)
class _Stage:
    name: str
    milliseconds: str
    utilization: str
    bar: float
    capacity: str
    is_bottleneck: bool


def run_page(facts: RunFacts, thumbnails: Mapping[int, Thumbnail], version: str) -> str:
    """Render the page as one self-contained HTML file without scripts.

    Args:
        facts: the data to show.
        thumbnails: images by row number; a row without one gets a placeholder.
        version: version of batchcls.
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
        headline=_headline_numbers(facts),
        churn=_churn_numbers(facts),
        flows=[cards.flow(flow, changes.changed) for flow in flows] if changes else [],
        more_flows=changes.flow_count - len(flows) if changes else 0,
        label_map=_mapped_rows(facts),
        mixes=_mixes(facts),
        histogram=None if confidence is None else _histogram(confidence),
        ends=(
            ()
            if confidence is None
            else (
                cards.items("Least confident", confidence.least_confident),
                cards.items("Most confident", confidence.most_confident),
            )
        ),
        examples=[
            cards.items(display_label(entry.label), items, count(entry.rows, "row"))
            for entry, items in examples
        ],
        quarantine=[cards.quarantined(group, facts.rows) for group in facts.quarantine_groups],
        gate_value=_gate_value,
        stages=_stages(facts.measurements.bottleneck),
        throughput=_throughput_summary(facts.measurements.bottleneck),
        about=[
            (name, display_text(Text(value, len(value)), _MAX_FACT_LENGTH)) for name, value in facts.facts
        ],
    )


def _headline_numbers(facts: RunFacts) -> list[_RunCard]:
    before, quarantined = facts.before, facts.quarantined
    cards = [
        _RunCard("rows", f"{facts.rows:,}", f"{difference(facts.rows, before.rows)} rows" if before else ""),
        _RunCard("predicted", f"{facts.predicted:,}", share(facts.predicted, facts.rows)),
    ]
    if facts.reused:
        cards.append(_RunCard("reused", f"{facts.reused:,}", share(facts.reused, facts.rows)))
    if facts.reheaded:
        cards.append(_RunCard("reheaded", f"{facts.reheaded:,}", share(facts.reheaded, facts.rows)))
    if facts.shared:
        cards.append(_RunCard("same image", f"{facts.shared:,}", share(facts.shared, facts.rows)))
    expected = facts.expected_large_fraction
    for network, rows in facts.by_network:
        note = share(rows, sum(rows for _, rows in facts.by_network))
        if network == LARGE and expected is not None:
            note += f", {100 * expected:.1f}% expected"
        cards.append(_RunCard(f"by the {network} network", f"{rows:,}", note))
    previous = f", {share(before.quarantined, before.rows)} before" if before else ""
    cards.append(_RunCard("in quarantine", f"{quarantined:,}", share(quarantined, facts.rows) + previous))
    if facts.changes is not None:
        both = facts.changes.both
        changed = facts.changes.changed
        cards.append(_RunCard("labels changed", f"{changed:,}", share(changed, both) if both else ""))
    if facts.measurements.bottleneck is not None:
        previous = (
            ""
            if not before or before.images_per_second is None
            else f"{rate(before.images_per_second)} before"
        )
        cards.append(_RunCard("images/s", rate(facts.measurements.images_per_second or 0.0), previous))
        cards.append(_RunCard("total duration", duration(facts.measurements.seconds_total or 0.0)))
    return cards


def _churn_numbers(facts: RunFacts) -> list[_RunCard]:
    changes = facts.changes
    if changes is None:
        return []
    both = changes.both
    cards = [
        _RunCard("same label", f"{changes.same:,}", f"{share(changes.same, both)} of the items in both runs"),
        _RunCard(
            "changed label",
            f"{changes.changed:,}",
            f"{share(changes.changed, both)} of the items in both runs",
        ),
        _RunCard("new", f"{changes.new:,}", "predicted in this run only"),
        _RunCard("removed", f"{changes.removed:,}", f"predicted in {changes.run_id} only"),
    ]
    causes = [_RunCard("of these", f"{rows:,}", cause) for cause, rows in changes.causes]
    note = f"{share(changes.mapped, both)} of the items in both runs, as the label map defines"
    mapped = [_RunCard("mapped label", f"{changes.mapped:,}", note)] if changes.mapped else []
    return [*cards[:2], *causes, *mapped, *cards[2:]]


@dataclass(frozen=True, slots=True)
class _MappedRow:
    """A row of the table of the label map."""

    kind: str
    before: str
    after: str
    rows_before: str
    rows: str


def _mapped_rows(facts: RunFacts) -> list[_MappedRow]:
    return [
        _MappedRow(
            kind=entry.kind,
            before=", ".join(display_label(label) for label in entry.before),
            after="-" if entry.after is None else display_label(entry.after),
            rows_before="-" if entry.rows_before is None else f"{entry.rows_before:,}",
            rows=f"{entry.rows:,}",
        )
        for entry in facts.label_map
    ]


def _mixes(facts: RunFacts) -> list[tuple[str, str, list[_MixRow]]]:
    """The tables of the category mix: caption, note on omitted categories, rows."""
    categories = facts.categories
    if categories is None:
        return []
    now, before = categories.predictions, categories.predictions_before

    def mix_rows(entries: Sequence[Category]) -> list[_MixRow]:
        shares = [_shares(entry, now, before) for entry in entries]
        longest = max((max(mine, old or 0.0) for mine, old in shares), default=0.0) or 1.0
        return [
            _MixRow(
                label=display_label(entry.label),
                rows=f"{entry.rows:,}",
                share=share(entry.rows, now),
                before="" if old is None or before is None else share(entry.rows_before or 0, before),
                change="" if old is None else percentage_points(mine, old),
                mean="-" if entry.mean_probability is None else f"{entry.mean_probability:.3f}",
                bar=round(100 * mine / longest, 2),
                bar_before=None if old is None else round(100 * old / longest, 2),
            )
            for entry, (mine, old) in zip(entries, shares, strict=True)
        ]

    hidden = categories.count - len(categories.largest)
    tables = [("Largest categories", f"and {hidden:,} more" if hidden else "", mix_rows(categories.largest))]
    if categories.moved:
        tables.append(("Largest shifts", "", mix_rows(categories.moved)))
    return tables


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
        highest=f"{100 * highest:.1f}%",
        note=note,
    )


def _normalized(bins: Sequence[int]) -> list[float]:
    total = sum(bins) or 1
    return [rows / total for rows in bins]


def _outline(heights: Sequence[float]) -> str:
    """The upper edge of the bars as an SVG path in a viewBox of 100 x 100 with y downwards."""
    width = 100 / len(heights)
    steps = [f"V{100 - height:.2f}H{(index + 1) * width:g}" for index, height in enumerate(heights)]
    return f"M0 100{''.join(steps)}V100"


def _gate_value(gate: GateResult, value: float | None) -> str:
    """The value or the limit of a gate; "-" if there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}%" if "fraction" in gate.gate else f"{value:.4g}"


def _stages(bottleneck: Bottleneck | None) -> list[_Stage]:
    if bottleneck is None:
        return []
    return [
        _stage(bottleneck, stage, milliseconds)
        for stage, milliseconds in bottleneck.milliseconds_per_image.items()
    ]


def _stage(bottleneck: Bottleneck, stage: Stage, milliseconds: float) -> _Stage:
    resource = bottleneck.resource_of(stage)
    utilization = bottleneck.images_per_second_after_start * milliseconds / 1000 / resource.capacity
    return _Stage(
        name=_STAGES.get(stage, stage),
        milliseconds=f"{milliseconds:.2f}",
        utilization=f"{utilization:.0%}",
        bar=round(min(100.0, 100 * utilization), 1),
        capacity=f"{resource.capacity:g} {resource.name}",
        is_bottleneck=stage == bottleneck.limited_by,
    )


def _throughput_summary(bottleneck: Bottleneck | None) -> str:
    """The throughput and the bottleneck in one sentence."""
    if bottleneck is None:
        return ""
    achieved, ideal = bottleneck.images_per_second_after_start, bottleneck.ideal_images_per_second
    start = f"{rate(achieved)} images/s after {duration(bottleneck.start_seconds)} of startup"
    if isinf(ideal):
        return f"{start}; no stage recorded any work."
    return (
        f"{start}, which is {share(achieved, ideal)} of the {rate(ideal)} images/s that the bottleneck resource "
        f"allows. Bottleneck: {_STAGES.get(bottleneck.limited_by, bottleneck.limited_by)}."
    )
