"""A real browser without a window, for tests of pages: Chromium with its driver, from the packages of the same names.

On a laptop they may be missing, and the test is skipped; where CI is set they may not, and it fails (as with
llama_tools).
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.llama_tools import missing

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One page at a time; what the tests ask of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> float:
        """Open a file and wait until its figures are drawn; milliseconds from the start of the navigation."""
        self.driver.set_window_size(width, height)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.messages()
        self.driver.get(path.resolve().as_uri())
        self.wait("return document.documentElement.dataset.drawn")
        return float(self.run("return performance.now()"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 30, poll_frequency=0.02).until(lambda driver: driver.execute_script(script))

    def point_at(self, x: float, y: float) -> None:
        """Move the pointer to a place in the window."""
        for step in (-3, 0):
            self.driver.execute_cdp_cmd(
                "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x + step, "y": y + step}
            )

    def messages(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"])
        return found

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        options = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
            options["clip"] = {
                "x": 0,
                "y": 0,
                "width": size["width"],
                "height": min(size["height"], 16_000),
                "scale": 1,
            }  # type: ignore[assignment]
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))

    def print(self, path: Path) -> None:
        document = self.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
        path.write_bytes(base64.b64decode(document["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a new profile, closed at the end."""
    program = next((found for found in map(shutil.which, BROWSERS) if found), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        missing(
            "there is no chromium with chromedriver on the PATH; Debian's packages are chromium and chromium-driver"
        )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, warnings.catch_warnings():
        for flag in (*FLAGS, f"--user-data-dir={directory}"):
            options.add_argument(flag)
        started = webdriver.Chrome(options=options, service=Service(driver))
        try:
            started.execute_cdp_cmd("Network.enable", {})
            yield Browser(started)
        finally:
            started.quit()
