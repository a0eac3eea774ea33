"""The page of an evaluation in a real browser: on a desk, on a phone, in the dark and on paper."""

from pathlib import Path

import pytest

from batchcls.evaluation.evaluator import evaluate_answers
from batchcls.evaluation.model_predictions import LogitStore
from tests.helpers.browser import DESK, PAPER, PHONE, Browser
from tests.helpers.evaluations import drawn_answers
from tests.unit.report.test_evaluate_page import page_of, subject


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty categories, one of them with a name that is longer than a phone is wide."""
    answers = drawn_answers(3000, 20, overconfidence=2)
    labels = ("clothes/" + "a_long_way_to_a_category/" * 5, *answers.labels[1:])
    paths = [("all", label) for label in labels]
    found = evaluate_answers(LogitStore(labels, answers.truth, answers.logits), paths, 0.9)
    path = tmp_path_factory.mktemp("page") / "evaluate.html"
    path.write_text(page_of(found, subject(3000), "How right is s3://models/" + "x" * 200))
    return path


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_fits_the_window_without_a_complaint_and_without_a_request(
    browser: Browser, page: Path, width: int
):
    browser.open(page, width=width)
    # The images of the test are no JPEGs; Chromium says nothing about that.
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    sizes = browser.ask(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert len(sizes) == 3
    assert min(sizes) > 300
    assert max(sizes) < 700


def test_in_the_dark_everything_turns_and_paper_stays_light(browser: Browser, page: Path):
    def colors() -> list[object]:
        style = "getComputedStyle(document.querySelector('{}')).{}"
        return [
            browser.ask(style.format("body", "backgroundColor")),
            browser.ask(style.format("figure svg [id$=line-before] path", "stroke")),
            browser.ask(style.format(".matrix td.diagonal", "backgroundColor")),
        ]

    browser.open(page, width=PAPER)
    light = colors()
    browser.emulate(dark=True)
    assert all(one != other for one, other in zip(light, colors(), strict=True))
    browser.emulate(dark=True, media="print")
    assert colors() == light
    overhang = browser.ask(
        "[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right - innerWidth)"
    )
    assert len(overhang) == 3
    assert max(overhang) <= 0
    assert browser.print_pdf().startswith(b"%PDF-")
