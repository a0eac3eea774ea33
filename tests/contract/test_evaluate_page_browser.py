"""Tests for the evaluation page in a browser: desktop, phone, dark mode and print."""

from pathlib import Path

import pytest

from batchcls.evaluation.evaluator import evaluate_logits
from batchcls.evaluation.model_predictions import LogitStore
from tests.helpers.browser import DESK, PAPER, PHONE, Browser
from tests.helpers.evaluations import random_logits
from tests.unit.report.test_evaluate_page import page_of, subject


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with twenty categories, one of them with a name wider than a phone."""
    store = random_logits(3000, 20, overconfidence=2)
    labels = ("clothes/" + "a_long_way_to_a_category/" * 5, *store.labels[1:])
    paths = [("all", label) for label in labels]
    found = evaluate_logits(LogitStore(labels, store.truth, store.logits), paths, 0.9)
    path = tmp_path_factory.mktemp("page") / "evaluate.html"
    path.write_text(page_of(found, subject(3000), "Evaluation of s3://models/" + "x" * 200))
    return path


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_fits_the_viewport_without_console_errors_and_requests(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    # The images of this test are not valid JPEG files, which Chromium does not report.
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sizes = browser.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert len(sizes) == 3
    assert min(sizes) > 300
    assert max(sizes) < 700


def test_dark_mode_changes_colors_and_print_stays_light(browser: Browser, page: Path):
    def colors() -> list[object]:
        style = "getComputedStyle(document.querySelector('{}')).{}"
        return [
            browser.evaluate(style.format("body", "backgroundColor")),
            browser.evaluate(style.format("figure svg [id$=line-before] path", "stroke")),
            browser.evaluate(style.format(".matrix td.diagonal", "backgroundColor")),
        ]

    browser.open(page, width=PAPER)
    light = colors()
    browser.emulate(dark=True)
    assert all(one != other for one, other in zip(light, colors(), strict=True))
    browser.emulate(dark=True, media="print")
    assert colors() == light
    overhang = browser.evaluate(
        "[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right - innerWidth)"
    )
    assert len(overhang) == 3
    assert max(overhang) <= 0
    assert browser.print_pdf().startswith(b"%PDF-")
