"""A browser and a mock server for the pages."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1200,820",
)  # fmt: skip


def _mock_server():
    spec = importlib.util.spec_from_file_location(
        "page_mock_server", Path(__file__).with_name("mock_server.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server():
    server = _mock_server().MockServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the pages are tested through selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, server):
    """The conversations' page. Complaints on the console fail a test; 4xx answers do not."""
    chromium.set_window_size(1200, 820)
    chromium.get(server.url)
    chromium.get_log("browser")
    yield chromium
    complaints = [
        line["message"] for line in chromium.get_log("browser") if "status of 4" not in line["message"]
    ]
    assert not complaints


@pytest.fixture
def page(browser, server):
    return Page(browser, server)


class Page:
    """What a user does and sees."""

    def __init__(self, browser, server):
        self.browser, self.server = browser, server
        self.wait_for(lambda: self.text("#model-name") == "demo-model")

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def text(self, selector):
        return self.one(selector).get_property("textContent")

    def click(self, selector):
        self.one(selector).click()

    def point_at(self, selector):
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).move_to_element(self.one(selector)).perform()

    def button(self, text, inside="body"):
        return next(b for b in self.all(f"{inside} button") if b.get_property("textContent") == text)

    def type(self, text):
        self.one("#prompt").send_keys(text)

    def run(self, script):
        return self.browser.execute_script(script)

    def wait_for(self, condition, seconds=30):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        # The page replaces elements while it streams: look again.
        wait = WebDriverWait(self.browser, seconds, 0.02, [StaleElementReferenceException])
        return wait.until(lambda _: condition())

    def say(self, text):
        """Send with the Enter key and wait for the end of the answer."""
        from selenium.webdriver.common.keys import Keys

        before = len(self.server.requests)
        self.type(text + Keys.ENTER)
        self.wait_for(lambda: len(self.server.requests) > before)
        self.wait_idle()

    def wait_idle(self):
        self.wait_for(lambda: self.one("#send").get_attribute("aria-label") == "Send")

    @property
    def texts(self):
        return self.run("return [...document.querySelectorAll('article .text')].map(e => e.textContent)")
