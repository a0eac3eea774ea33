"""A headless Chromium for tests of report pages."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


PHONE, DESK, PAPER = 390, 1280, 1032  # CSS pixels; PAPER is the width of A4 landscape without margins


class Browser:
    """A browser window. The browser stores console messages and requests until they are read."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int, height: int = 900) -> None:
        """Load a file into a window of `width` x `height` CSS pixels."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.command("Emulation.setScrollbarsHidden", hidden=True)
        self.requests()
        self.driver.get(page.as_uri())
        while not self.evaluate("innerWidth"):  # a busy machine applies the size of the window late
            pass

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        """Emulate the user preferences and the media type."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)

    def evaluate(self, script: str) -> object:
        """Evaluate a JavaScript expression."""
        return self.driver.execute_script(f"return {script}")

    def console(self) -> list[str]:
        """Warnings and errors since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Requested URLs since the last call, without data: URLs."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for entry in sent if not (url := entry["request"]["url"]).startswith("data:")]

    def screenshot(self) -> bytes:
        """Screenshot of the whole page as PNG."""
        result = self.command("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        return base64.b64decode(result["data"])

    def print_pdf(self) -> bytes:
        """The printed page as PDF, with the page size of its style sheet."""
        result = self.command("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        return base64.b64decode(result["data"])

    def command(self, name: str, **arguments: object) -> dict[str, str]:
        """Execute a command of the Chrome DevTools Protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Open a browser with its own profile; skips the test if Chromium is not installed."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
