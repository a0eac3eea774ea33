"""Pictures of a run's page with what is said of them: rows with an answer, flows between labels, quarantine."""

from collections.abc import Mapping
from dataclasses import dataclass

from batchcls.report.run_facts import Failed, Flow, Item, Refused, Text, Thumbnail
from batchcls.report.wording import count, share, shown, shown_label, size
from batchcls.schema import REASONS, Reason
from batchcls.uris import redact_uri

_NO_PICTURE = Thumbnail("", "not fetched")
_LONGEST_LINE = 120


@dataclass(frozen=True, slots=True)
class Card:
    """A picture with its id, what is said of it, and where it is, for a pointer that rests on it."""

    picture: Thumbnail
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
    """Makes cards; `thumbnails` are pictures by row number, and a row without one gets an empty box."""

    def __init__(self, thumbnails: Mapping[int, Thumbnail]) -> None:
        self._thumbnails = thumbnails

    def item(self, item: Item) -> Card:
        """A row with its best label and the one that came next."""
        lines = [f"{item.probability:.3f} {shown_label(item.label)}"]
        if item.runner_up is not None:
            lines.append(f"{item.runner_up[1]:.3f} {shown_label(item.runner_up[0])}")
        picture = self._thumbnails.get(item.row, _NO_PICTURE)
        return Card(picture, shown(item.item_id), tuple(lines), _hint(item.row, item.uri))

    def items(self, heading: str, items: tuple[Item, ...], note: str = "") -> Group:
        """Rows under a heading."""
        return Group(heading, note, tuple(self.item(item) for item in items))

    def flow(self, flow: Flow, changed: int) -> FlowGroup:
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
        picture = self._thumbnails.get(entry.row, Thumbnail("", _words(reason)))
        said = tuple(line for line in lines if line)
        return Card(picture, shown(entry.item_id), said, _hint(entry.row, entry.uri))


def _words(reason: Reason) -> str:
    return reason.value.replace("_", " ")


def _hint(row: int, uri: Text) -> str:
    """Where a row is in the manifest, and where its picture is, without credentials."""
    if uri.start is None:
        return f"row {row:,}, the picture is in the manifest"
    clean = redact_uri(uri.start)
    length = uri.length if clean == uri.start else len(clean)
    return f"row {row:,}, {shown(Text(clean, length), _LONGEST_LINE)}"
