"""Writes the table of docs/zoo.md from the records, so that the page cannot drift: `make docs`."""

from pathlib import Path

from batchcls.models.zoo import ZooRecord, zoo_records

PAGE = Path(__file__).with_name("zoo.md")
HEADING = "## The table\n"
_COLUMNS = (
    "name",
    "family",
    "year",
    "M parameters",
    "G multiply-adds",
    "pixels",
    "top-1",
    "weights tag",
    "good for",
    "warning",
)
_NUMBERS = ("year", "M parameters", "G multiply-adds", "pixels", "top-1")


def table() -> str:
    """The records in Markdown, one line each."""
    rule = ["--:" if column in _NUMBERS else "---" for column in _COLUMNS]
    rows = [_COLUMNS, rule, *(_cells(record) for record in zoo_records())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(record: ZooRecord) -> list[str]:
    default = record.weights[0]
    return [
        f"`{record.name}`",
        record.family,
        str(record.year),
        f"{record.parameters / 1e6:.1f}",
        f"{record.multiply_adds / 1e9:.2f}",
        str(record.input_size),
        f"{default.top1:.3f}",
        f"`{default.tag}`",
        record.good_for,
        record.warning or "",
    ]


def main() -> None:
    """Replace everything under the heading of the table, which is the last of the page."""
    prose, heading, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    PAGE.write_text(f"{prose}{heading}\n{table()}", encoding="utf-8")


if __name__ == "__main__":
    main()
