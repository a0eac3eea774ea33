"""The page of a run in a real browser: on a desk, on a phone, in the dark and on paper, with hostile strings in it."""

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
    """Everything that a page can show, with real images of three shapes for all rows but one."""
    folder = tmp_path_factory.mktemp("page")
    sources = []
    for number, (width, height) in enumerate(((300, 200), (200, 300), (900, 60))):
        data = encode(draw(number, width, height), "JPEG")
        (folder / f"{number}.jpg").write_bytes(data)
        sources.append(Source(str(folder / f"{number}.jpg"), sha256(data).hexdigest()))
    thumbnails = make_thumbnails(
        {row: sources[row % 3] for row in range(100)}, FetchPolicy(), DecodeLimits(), seconds=60
    )
    thumbnails[2] = Thumbnail("", "another image by now")
    path = folder / "report.html"
    path.write_text(run_page(full_facts(), thumbnails, "0.1.0"))
    assert path.stat().st_size < 1_000_000
    return path


def test_it_loads_without_a_complaint_and_without_a_request(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.ask("document.compatMode") == "CSS1Compat"


def test_hostile_strings_are_inert(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    assert browser.ask("document.title") == "Run 20261125-033000-4f2a"
    assert browser.ask("document.querySelectorAll('script, .card b b, img[onerror], [onclick]').length") == 0
    assert "<script>document.title" in str(browser.ask("document.body.innerText"))


def test_every_image_is_there(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    sizes = browser.ask(
        "[...document.images].map(one => [one.complete, one.naturalWidth, one.naturalHeight])"
    )
    assert len(sizes) > 40
    assert all(complete and 0 < max(width, height) <= 96 for complete, width, height in sizes)
    assert "another image by now" in str(browser.ask("document.body.innerText"))
    bars = browser.ask(
        "[...document.querySelectorAll('.histogram rect')].map(bar => bar.getBoundingClientRect().height)"
    )
    assert len(bars) == 20
    assert 150 < max(bars) < 200


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int):
    browser.open(page, width=width)
    assert browser.ask("innerWidth") == width
    assert browser.ask("document.documentElement.scrollWidth") <= width
    outside = browser.ask(
        "[...document.querySelectorAll('main *')].filter(one => !one.closest('.scroll, svg') && "
        "one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 100))"
    )
    assert outside == []


def test_cards_do_not_cover_each_other(browser: Browser, page: Path):
    browser.open(page, width=PHONE)
    covered = browser.ask(
        "[...document.querySelectorAll('.cards')].flatMap(box => [...box.children].map(card => "
        "card.scrollWidth - card.clientWidth)).filter(over => over > 0).length"
    )
    assert covered == 0


def colors(browser: Browser) -> list[object]:
    style = "getComputedStyle(document.querySelector('{}')).{}"
    return [
        browser.ask(style.format(*place))
        for place in (
            ("body", "backgroundColor"),
            ("body", "color"),
            ("h1", "color"),
            (".fill", "backgroundColor"),
        )
    ]


def test_in_the_dark_the_page_turns_and_paper_is_light(browser: Browser, page: Path):
    browser.open(page, width=DESK)
    light = colors(browser)
    browser.emulate(dark=True)
    assert all(one != other for one, other in zip(light, colors(browser), strict=True))
    browser.emulate(dark=True, media="print")
    assert colors(browser) == light


def test_it_prints_whole(browser: Browser, page: Path):
    browser.open(page, width=PAPER)
    browser.emulate(media="print")
    overhang = browser.ask(
        "[...document.querySelectorAll('table')].map(table => table.getBoundingClientRect().right - innerWidth)"
    )
    assert len(overhang) == 4
    assert max(overhang) <= 0
    browser.emulate()
    paper = browser.print_pdf()
    assert paper.startswith(b"%PDF-")
    # How many depends on the fonts of the machine: 12 to 18 were seen. A page cut off prints as one.
    assert 3 <= paper.count(b"/Type /Page\n") <= 30
