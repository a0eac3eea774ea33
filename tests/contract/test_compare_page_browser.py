"""Tests for the comparison page in a browser: desktop, phone, dark mode and print."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from batchcls.comparison.recommend import Requirements, recommend
from batchcls.report.compare_page import PageContext, compare_page
from tests.helpers.browser import DESK, PAPER, PHONE, Browser
from tests.helpers.measurements import SERVER, measurement, six_backbones

LONG_NAME = "s3://models/" + "a_long_way_to_a_bundle/" * 5


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with six backbones on two engines, and one model with a name wider than a phone."""
    measurements = [*six_backbones(), measurement(LONG_NAME, p50=30, right=150)]
    requirements = Requirements(target_ms=80, price_per_hour=0.4)
    created = datetime(2026, 11, 23, 20, 40, tzinfo=UTC)
    context = PageContext("Comparison of backbones", LONG_NAME + "x" * 200, 300, created, "0.1.0")
    advice = {SERVER.key: recommend(measurements, requirements)}
    path = tmp_path_factory.mktemp("page") / "compare.html"
    path.write_text(compare_page(measurements, requirements, advice, context))
    assert path.stat().st_size < 1_000_000
    return path


def test_loads_without_console_errors_and_requests(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.title") == "Comparison of backbones"
    assert browser.evaluate("document.compatMode") == "CSS1Compat"


def test_detects_console_errors_and_requests(browser: Browser, tmp_path: Path):
    """Verifies the previous test: missing resources are detected."""
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><img src='missing.png'><script>nothing()</script>")
    browser.open(broken, width=DESK)
    messages: list[str] = []
    while len(messages) < 2:  # the browser logs the missing file when the page is already loaded
        messages += browser.console()
    assert len(messages) == 2
    assert browser.requests() == [broken.as_uri(), (tmp_path / "missing.png").as_uri()]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_content_fits_the_viewport(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "[...document.querySelectorAll('.scroll')].every(box => box.getBoundingClientRect().right <= innerWidth)"
    )


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_both_plots_have_readable_labels(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect())"
        ".map(box => [box.width, box.height])"
    )
    assert len(sizes) == 2
    for drawn_width, height in sizes:
        assert drawn_width > 300
        assert height > 250
    labels = browser.evaluate(
        "[...document.querySelectorAll('figure svg [id*=label-]')].map(label => label.textContent)"
    )
    assert len(labels) == 2 * 13
    assert all(labels)
    heights = browser.evaluate(
        "[...document.querySelectorAll('figure svg text')].map(text => text.getBoundingClientRect().height)"
    )
    assert min(heights) > 8


def test_labels_do_not_overlap_in_the_font_of_the_browser(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('figure:first-child svg [id*=label-]')].map(label => "
        "label.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])"
    )
    assert len(boxes) == 13
    for index, box in enumerate(boxes):
        for other in boxes[:index]:
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            # Bounding boxes of text extend above and below the letters.
            assert width <= 0 or height <= 4, (box, other)


def colors(browser: Browser) -> tuple[object, object, object]:
    style = "getComputedStyle(document.querySelector('{}')).{}"
    return (
        browser.evaluate(style.format("body", "backgroundColor")),
        browser.evaluate(style.format("body", "color")),
        browser.evaluate(style.format("figure svg [id*=front-measured] path", "stroke")),
    )


def test_dark_mode_changes_page_and_plot_colors(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    light = colors(browser)
    browser.emulate(dark=True)
    dark = colors(browser)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert light[1] == light[2]
    assert dark[1] == dark[2]


def test_print_is_light_in_dark_mode_and_fits_all_tables(browser: Browser, page: Path):
    browser.open(page, width=PAPER)
    light = colors(browser)
    browser.emulate(dark=True, media="print")
    assert colors(browser) == light
    overhang = browser.evaluate(
        "[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right - innerWidth)"
    )
    assert len(overhang) == 5
    assert max(overhang) <= 0


def test_prints_all_pages(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    paper = browser.print_pdf()
    assert paper.startswith(b"%PDF-")
    assert 3 <= paper.count(b"/Type /Page\n") <= 10
    assert len(paper) > 30_000


def test_screenshot_is_not_blank(browser: Browser, page: Path):
    browser.open(page, width=PHONE)
    assert len(browser.screenshot()) > 50_000
