"""A browser that is shared by all tests of HTML pages."""

from collections.abc import Iterator

import pytest

from tests.helpers.browser import Browser, open_browser


@pytest.fixture(scope="session")
def _window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def browser(_window: Browser) -> Browser:
    """The browser window in light mode, with empty logs of console and requests."""
    _window.emulate()
    _window.console()
    _window.requests()
    return _window
