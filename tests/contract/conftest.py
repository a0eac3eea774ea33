"""One browser for all tests that look at pages."""

from collections.abc import Iterator

import pytest

from tests.helpers.browser import Browser, open_browser


@pytest.fixture(scope="session")
def _window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def browser(_window: Browser) -> Browser:
    """The window, in the light and with nothing said or asked for yet."""
    _window.emulate()
    _window.console()
    _window.requests()
    return _window
