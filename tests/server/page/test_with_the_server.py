"""The pages in a real browser, served by the real server, with its checks of hosts and origins."""

from __future__ import annotations

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


class Tab:
    """A browser at a page of a server."""

    def __init__(self, chromium, url):
        self.browser = chromium
        chromium.get(url)

    def text(self, selector):
        return self.browser.find_element("css selector", selector).get_property("textContent")

    def texts(self):
        # At once: the page replaces elements while it streams.
        script = "return [...document.querySelectorAll('article .text')].map(each => each.textContent)"
        return self.browser.execute_script(script)

    def type(self, text):
        self.browser.find_element("css selector", "#prompt").send_keys(text)

    def wait_for(self, condition):
        wait = WebDriverWait(self.browser, 30, 0.02, [StaleElementReferenceException])
        wait.until(lambda _: condition())


@pytest.fixture
def tab(chromium):
    return lambda url: Tab(chromium, url)


def test_a_conversation_and_a_stop(serve, tab, eventually):
    server = serve(pieces=[" word"] * 2000, step_s=0.01)
    page = tab(server.url)
    page.wait_for(lambda: page.text("#model-name") == "demo")
    page.type("Tell a story." + Keys.ENTER)
    page.wait_for(lambda: any("word word word" in text for text in page.texts()))
    page.type(Keys.ESCAPE)
    eventually(lambda: server.engine.aborted == ["chatcmpl-0"])
    server.engine.pieces = ["The ", "end."]
    page.type("And then?" + Keys.ENTER)
    page.wait_for(lambda: "The end." in page.texts())
    assert len(server.engine.requests) == 2


def test_the_status_page(serve, tab):
    page = tab(f"{serve().url}/status")
    page.wait_for(lambda: page.text("#state") == "Live")
    assert page.text("#model") == "demo"
    shown = page.text("main") if page.browser.find_elements("css selector", "main") else page.text("body")
    assert "25.0 %" in shown
