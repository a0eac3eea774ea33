"""Tests for the run report in a browser: desktop, phone, dark mode, print and hostile strings."""

from hashlib import sha256
from pathlib import Path

import pytest

from batchcls.images.fetch import FetchPolicy
from batchcls.images.load_config import DecodeLimits
from batchcls.report.run_page import run_page
from batchcls.report.run_page_data import Thumbnail
from batchcls.report.thumbnails import Source, make_thumbnails
from tests.helpers.browser import DESK, PAPER, PHONE, Browser
from tests.helpers.drawing import draw, encode
from tests.helpers.run_pages import full_facts


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section filled, with images in three aspect ratios for all rows but one."""
    folder = tmp_path_factory.mktemp("page")
    sources = []
    for number, (width, height) in enumerate(((300, 200), (200, 300), (900, 60))):
        data = encode(draw(number, width, height), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data)
        sources.append(Source(str(folder / f"{number}.jpg"), sha256(data).hexdigest()))
    thumbnails = make_thumbnails(
        {row: sources[row % 3] for row in range(100)}, FetchPolicy(), DecodeLimits(), seconds=60
    )
    thumbnails[2] = Thumbnail("", "image changed since the run")
    path = folder / "report.html"
    path.write_text(run_page(full_facts(), thumbnails, "0.1.0"))
    assert path.stat().st_size < 1_000_000
    return path


def test_loads_without_console_errors_and_requests(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.compatMode") == "CSS1Compat"


def test_hostile_strings_are_inert(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    assert browser.evaluate("document.title") == "Run 20261125-033000-4f2a"
    assert (
        browser.evaluate("document.querySelectorAll('script, .card b b, img[onerror], [onclick]').length")
        == 0
    )
    assert "<script>document.title" in str(browser.evaluate("document.body.innerText"))


def test_shows_every_image(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    sizes = browser.evaluate(
        "[...document.images].map(one => [one.complete, one.naturalWidth, one.naturalHeight])"
    )
    assert len(sizes) > 40
    assert all(complete and 0 < max(width, height) <= 96 for complete, width, height in sizes)
    assert "image changed since the run" in str(browser.evaluate("document.body.innerText"))
    bars = browser.evaluate(
        "[...document.querySelectorAll('.histogram rect')].map(bar => bar.getBoundingClientRect().height)"
    )
    assert len(bars) == 20
    assert 150 < max(bars) < 200


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_content_fits_the_viewport(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, svg') && "
        "one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 100))"
    )
    assert outside == []


def test_cards_do_not_overflow(browser: Browser, page: Path):
    browser.open(page, width=PHONE)
    covered = browser.evaluate(
        "[...document.querySelectorAll('.cards')].flatMap(box => [...box.children].map(card => "
        "card.scrollWidth - card.clientWidth)).filter(over => over > 0).length"
    )
    assert covered == 0


def colors(browser: Browser) -> list[object]:
    style = "getComputedStyle(document.querySelector('{}')).{}"
    return [
        browser.evaluate(style.format(*target))
        for target in (
            ("body", "backgroundColor"),
            ("body", "color"),
            ("h1", "color"),
            (".fill", "backgroundColor"),
        )
    ]


def test_dark_mode_changes_colors_and_print_stays_light(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    light = colors(browser)
    browser.emulate(dark=True)
    assert all(one != other for one, other in zip(light, colors(browser), strict=True))
    browser.emulate(dark=True, media="print")
    assert colors(browser) == light


def test_prints_all_pages(browser: Browser, page: Path):
    browser.open(page, width=PAPER)
    browser.emulate(media="print")
    overhang = browser.evaluate(
        "[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right - innerWidth)"
    )
    assert len(overhang) == 5
    assert max(overhang) <= 0
    browser.emulate()
    paper = browser.print_pdf()
    assert paper.startswith(b"%PDF-")
    # The number of pages depends on the fonts of the machine (12 to 18 observed). A truncated page prints as one.
    assert 3 <= paper.count(b"/Type /Page\n") <= 30
