"""Tests for the content and the escaping of the run report page."""

import re
from dataclasses import replace

import pytest

from batchcls.report.formatting import (
    difference,
    display_text,
    duration,
    percentage_points,
    rate,
    share,
    size,
)
from batchcls.report.run_page import run_page
from batchcls.report.run_page_data import PublishStatus, RunFacts, Text, Thumbnail
from batchcls.runs.records import Measurements
from batchcls.schema import REASONS
from tests.helpers.run_pages import ATTACK, full_facts
from tests.unit.report.test_compare_page import Reader

IMAGE = Thumbnail("data:image/jpeg;base64,AAAA", "")


@pytest.fixture(scope="module")
def facts() -> RunFacts:
    return full_facts()


@pytest.fixture(scope="module")
def page(facts: RunFacts) -> str:
    return run_page(facts, dict.fromkeys(range(100), IMAGE), "0.1.0")


def test_page_is_self_contained(page: str):
    reader = Reader(page)
    assert not {"script", "iframe", "object", "embed", "a", "form"} & set(reader.tags)
    links = reader.values("href") + reader.values("src")
    assert {link for link in links if not link.startswith("data:,")} == {IMAGE.source}
    assert "@import" not in page
    assert "url(" not in page
    assert not [name for name, _ in reader.attributes if name.startswith("on")]


def test_escapes_catalog_strings(page: str):
    text = Reader(page).text
    assert ATTACK[:40] in text
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "<i>mugs" not in page
    assert "\u202e" not in page
    assert "\r" not in page
    assert "(1,000,000 characters)" in text
    assert "A" * 100 not in page


def test_credentials_in_addresses_are_not_display_text(page: str):
    hints = Reader(page).values("title")
    assert "row 10, https://shop.example/10.jpg" in hints
    assert "secret" not in page
    assert "hidden" not in page


def test_sections_appear_in_order(page: str, facts: RunFacts):
    text = Reader(page).text
    order = [
        facts.publish_status.headline,
        facts.publish_status.explanation,
        "1,000",
        "changed labels fraction",
        "another model",
        "lamps / desk",
        "240",
        "s3://shop/catalog/",
    ]
    positions = [text.find(words, text.find("20261125-033000-4f2a · ")) for words in order]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_label_map_is_shown_with_row_counts(page: str, facts: RunFacts):
    text = " ".join(Reader(page).text.split())
    assert "1.3% of the items in both runs, as the label map defines" in text
    for line in ("retiredgift cards-30", "splitshoes", "furniture5671,234"):
        assert line in text
    assert "Label map" not in Reader(run_page(replace(facts, label_map=()), {}, "0.1.0")).text


def test_shows_every_quarantine_reason_with_its_meaning(page: str):
    text = Reader(page).text
    for reason, record in REASONS.items():
        assert record.meaning in text
        assert reason.value.replace("_", " ") in text
    assert text.count("and 1 more, in quarantine/*.parquet") == len(REASONS)


def test_placeholder_states_why_the_image_is_missing(facts: RunFacts):
    text = Reader(run_page(facts, {10: Thumbnail("", "not fetched in time")}, "0.1.0")).text
    assert "not fetched in time" in text
    assert "not fetched" in text.replace("not fetched in time", "")


def test_renders_first_run_without_predictions(facts: RunFacts):
    bare = replace(
        facts,
        publish_status=PublishStatus(True, "Published"),
        gates=(),
        quarantine_groups=(),
        measurements=Measurements(),
        confidence=None,
        categories=None,
        changes=None,
        before=None,
    )
    reader = Reader(run_page(bare, {}, "0.1.0"))
    assert "There is no baseline run to compare with." in reader.text
    assert "The quarantine is empty: every row has a prediction." in reader.text
    assert "svg" not in reader.tags
    without_baseline = replace(facts, changes=None, before=None)
    assert "There is no baseline run" in Reader(run_page(without_baseline, {}, "0.1.0")).text


def test_bar_widths_are_percentages(page: str):
    widths = [float(width) for width in re.findall(r"(?:width|left):([\d.]+)%", page)]
    assert len(widths) > 10
    assert max(widths) == 100
    assert min(widths) >= 0


def test_formats_numbers_and_strings():
    assert (share(1, 3), share(0, 3), share(1, 300), share(1, 10**6), share(1, 0)) == (
        *("33.3%", "0.0%", "0.33%"),
        *("< 0.01%", "-"),
    )
    assert share(999_999, 10**6) == "> 99.99%"
    changes = [percentage_points(*pair) for pair in ((0.12, 0.1), (0.1, 0.12), (0.1, 0.100001))]
    assert changes == [
        "+2.00",
        "\u22122.00",
        "0.00",
    ]
    assert (difference(5, 1204), difference(3, 3)) == ("\u22121,199", "\u00b10")
    assert (duration(4.26), duration(59), duration(3_725), duration(90_000)) == (
        *("4.3 s", "59 s", "1 h 2 min", "1 d 1 h"),
    )
    assert (size(21), size(20_400), size(3_200_000_000)) == ("21 bytes", "20 KB", "3.2 GB")
    assert (rate(12_345.6), rate(17.26)) == ("12,346", "17.3")
    assert (display_text(Text(None, 0)), display_text(Text("", 0)), display_text(Text("a\nb", 3))) == (
        "(null)",
        "(empty)",
        "a\ufffdb",
    )
    assert display_text(Text("abcdef", 6), 4) == "abc\u2026"


def test_page_counts_rows_by_network_with_the_expected_share(facts: RunFacts):
    networks = (("small", 750), ("large", 250))
    cascade = replace(facts, by_network=networks, expected_large_fraction=0.184)
    text = Reader(run_page(cascade, {}, "0.1.0")).text
    assert "by the large network" in text
    assert "25.0%, 18.4% expected" in text
    assert "by the large network" not in Reader(run_page(facts, {}, "0.1.0")).text
