"""Tests for the content, the escaping and the plots of the comparison page."""

import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcls.comparison.measurement import Measurement
from batchcls.comparison.recommend import Requirements, format_number, percent, recommend
from batchcls.report.compare_page import PageContext, compare_page
from batchcls.report.pareto_plot import Label, Rectangle, log_ticks, pareto_front, place_labels, shorten
from tests.helpers.measurements import LAPTOP, SERVER, measurement, six_backbones

CONTEXT = PageContext(
    "Backbones", "catalog.parquet", 300, datetime(2026, 11, 23, 20, 40, tzinfo=UTC), "0.1.0"
)
ATTACK = "<script>alert(1)</script>"


def page_of(measurements: Sequence[Measurement], context: PageContext = CONTEXT, **requirements: Any) -> str:
    needs = Requirements(**requirements)
    by_hardware: dict[str, list[Measurement]] = {}
    for entry in measurements:
        by_hardware.setdefault(entry.hardware.key, []).append(entry)
    advice = {key: recommend(entries, needs) for key, entries in by_hardware.items()}
    return compare_page(measurements, needs, advice, context)


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.attributes if found == name]


@pytest.fixture(scope="module")
def full() -> str:
    return page_of(six_backbones(), target_ms=80, price_per_hour=0.4)


def images(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def test_page_is_self_contained(full: str):
    reader = Reader(full)
    assert not {"script", "img", "iframe", "object", "embed"} & set(reader.tags)
    links = reader.values("href") + reader.values("src") + reader.values("xlink:href")
    assert links
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert set(re.findall(r"url\((.)", full)) == {"#"}
    assert "@import" not in full
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert len(full.encode()) < 1_000_000


def test_shows_all_values_of_every_measurement(full: str):
    text = Reader(full).text
    for entry in six_backbones():
        latency, best = entry.latency, entry.best
        for value in (
            latency.p50_ms,
            latency.p95_ms,
            latency.p99_ms,
            best.images_per_second,
            entry.load_seconds,
        ):
            assert format_number(value) in text
        for part in entry.throughput:
            assert f"{format_number(part.images_per_second)} ({part.spread * 100:.0f}%)" in text
            assert f"{format_number(part.peak_memory_mib)} ({part.repeats})" in text
        assert format_number(entry.cost_per_million(0.4)) in text
        assert format_number(entry.parameters / 1e6) in text
        assert percent(entry.agreement.top1 or 0) in text
        for words in (entry.architecture, entry.weights, entry.bundle_fingerprint[:12], str(entry.hardware)):
            assert words in text
    assert "other load: 0.6 cores" in text
    assert "low agreement" in text
    assert "23 November 2026, 20:40 UTC" in text


def test_shows_the_recommendation_with_all_reasons(full: str):
    text = " ".join(Reader(full).text.split())
    advice = recommend(six_backbones(), Requirements(target_ms=80, price_per_hour=0.4))
    assert advice.model == "resnet50"
    assert "Use resnet50 (torch bf16) Top-1 78.7%" in text
    for sentence in advice.sentences[1:]:
        assert sentence in text
    for rejection in advice.rejected:
        assert rejection.reason in text
    assert len(re.findall('<tr class="marked">', full)) == 4


def test_escapes_user_defined_names():
    model = measurement(ATTACK, architecture=f"timm:{ATTACK}", weights=f"file {ATTACK}", right=200)
    other = measurement('"><img src=x onerror=alert(1)>', p50=20)
    context = PageContext(ATTACK, f"s3://b/{ATTACK}", 300, CONTEXT.created, ATTACK)
    page = page_of([model, other], context)
    reader = Reader(page)
    assert not {"script", "img"} & set(reader.tags)
    assert "onerror" not in dict(reader.attributes)
    assert reader.text.count(ATTACK) >= 6
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in images(page)[0]


@pytest.mark.parametrize(
    "name", ["$x$", r"$\frac{", "a--b", "%s {0} {{x}}", "bell\x07", "\N{SNOWMAN}", "x" * 200]
)
def test_plots_any_name(name: str):
    page = page_of([measurement(name)])
    assert shorten(name) in Reader(images(page)[0]).text
    assert name in Reader(page).text


def test_shortens_long_names():
    assert shorten("resnet50") == "resnet50"
    long = shorten("s3://bucket/a/long/way/to/a/bundle")
    assert len(long) == 28
    assert long.endswith("way/to/a/bundle")


def test_ranks_each_hardware_separately():
    page = page_of([*six_backbones(), *six_backbones(LAPTOP, slower=2)])
    sections = page.split('<section class="hardware"')[1:]
    assert len(sections) == 2
    for section, hardware in zip(sections, (SERVER, LAPTOP), strict=True):
        assert f'id="hardware-{hardware.key}"' in section
        assert f'href="#hardware-{hardware.key}"' in page
        assert len(images(section)) == 2
        assert section.count('class="lead"') == 1
        assert section.count('scope="row"') == 4 * 12 + 11
    assert "612" in sections[0]
    assert "1,224" not in sections[0]
    assert "1,224" in sections[1]


def test_both_plots_show_a_label_and_a_point_for_each_candidate(full: str):
    assert len(images(full)) == 2
    for image in images(full):
        reader = Reader(image)
        identifiers = reader.values("id")
        for kind in ("label", "point"):
            assert sum(f"-{kind}-" in value for value in identifiers) == 12
        assert "resnet50 bf16" in reader.text
        assert "p95" in reader.text  # in a tooltip
        assert reader.values("role") == ["img"]
        assert reader.values("aria-label")[0].startswith("Top-1 accuracy vs.")
    assert "target 80 ms" in Reader(images(full)[0]).text
    assert "target" not in Reader(images(full)[1]).text


def test_element_ids_are_unique_and_references_resolve():
    reader = Reader(page_of([*six_backbones(), *six_backbones(LAPTOP)], target_ms=80))
    identifiers = reader.values("id")
    assert len(identifiers) == len(set(identifiers))
    used = [link[1:] for link in reader.values("href") if link.startswith("#")]
    used += [value[5:-1] for value in reader.values("clip-path")]
    assert used
    assert set(used) <= set(identifiers)


def test_plots_use_the_colors_of_the_page(full: str):
    for image in images(full):
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b", re.sub(r'(href|clip-path|id)="[^"]*"', "", image))
        assert "font-family" not in image
        for variable in ("ink", "muted", "rule", "accent"):
            assert f"var(--{variable})" in image
            assert f"--{variable}:" in full


def test_published_points_are_hollow_with_a_separate_front():
    measured, published = measurement("a"), measurement("b", right=None, published_top1=0.8)
    hollow = "fill: var(--ground)"
    for candidates, filled in (([measured], True), ([published], False), ([measured, published], True)):
        page = page_of(candidates)
        image = images(page)[0]
        assert (hollow in image) == (published in candidates)
        assert ("front-measured" in image) == filled
        assert ("front-published" in image) == (published in candidates)
        assert ("top-1 measured on the sample" in page) == filled
        assert ("as published for ImageNet-1k" in page) == (published in candidates)


def test_omits_the_plot_without_any_accuracy():
    page = page_of([measurement("a", right=None), measurement("b", right=None)])
    assert not images(page)
    assert "their accuracy is unknown: a (torch fp32), b (torch fp32)" in page


def test_shows_results_without_a_recommendation():
    page = compare_page([measurement()], Requirements(), {}, CONTEXT)
    assert "Results" in page
    assert "Use " not in page


def test_states_that_no_candidate_meets_the_requirements():
    page = page_of(six_backbones(), target_ms=1)
    assert "None of the 12 candidates meets the requirements." in Reader(page).text
    assert '<tr class="marked">' not in page


def test_cost_is_node_seconds_without_a_price():
    page = page_of([measurement(rates=(50, 61.2))])
    assert "node-seconds per million images" in page
    assert "16,340" in page


def test_marks_the_recommended_device():
    server = SERVER.model_copy(update={"gpu": "NVIDIA L4"})
    page = page_of([measurement(hardware=server), measurement(hardware=server, device="cuda", p50=5)])
    assert set(re.findall('<tr class="marked">\\s*<th scope="row">resnet50<small>(.*?) ·', page)) == {
        "torch fp32 on cuda"
    }


def test_rendering_is_deterministic(full: str):
    assert page_of(six_backbones(), target_ms=80, price_per_hour=0.4) == full


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=12))
def test_front_contains_all_non_dominated_points(points: list[tuple[int, int]]):
    front = [points[index] for index in pareto_front(points)]
    dominated = {(x, y) for x, y in points for a, b in points if (a, b) != (x, y) and a <= x and b >= y}
    assert front == sorted(set(points) - dominated)


def test_labels_do_not_overlap_labels_or_points():
    labels = [Label(40 + 45.0 * (index % 6), 60 + 9.0 * (index % 4), 70, 12) for index in range(12)]
    bounds, obstacle = Rectangle(0, 0, 380, 260), Rectangle(0, 100, 380, 103)
    boxes = place_labels(labels, bounds, [obstacle])
    points = [Rectangle(label.x - 2, label.y - 2, label.x + 2, label.y + 2) for label in labels]
    for index, box in enumerate(boxes):
        assert bounds.contains(box)
        assert box.right - box.left == pytest.approx(70)
        others = [*boxes[:index], *boxes[index + 1 :], *points, obstacle]
        assert sum(box.overlap(other) for other in others) == 0
    assert place_labels(labels, bounds, [obstacle]) == boxes


def test_single_label_is_placed_next_to_its_point():
    [box] = place_labels([Label(100, 100, 60, 12)], Rectangle(0, 0, 300, 200), [])
    assert 4 < box.distance(100, 100) <= 6


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1000), (10, 11), (0.3, 0.9), (95, 140), (3_000, 400_000), (7, 7.05)]
)
def test_axis_has_two_to_eight_ticks(low: float, high: float):
    ticks = log_ticks(low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
