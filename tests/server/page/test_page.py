"""The conversations' page in a real browser, against a mock server."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[3] / "hybrid" / "server" / "page"


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

    def wait_for(self, condition, seconds=10):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, seconds, 0.02).until(lambda _: condition())

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
        return [each.get_property("textContent") for each in self.all("article .text")]


def test_a_conversation(page):
    page.say("hello")
    body = page.server.requests[0]
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (
        body["stream"] and body["stream_options"] == {"include_usage": True} and body["model"] == "demo-model"
    )
    answer = "article.assistant .text"
    assert page.text(f"{answer} h4") == "Foxes" and page.text(f"{answer} strong") == "fox"
    assert page.one(f"{answer} a").get_attribute("href") == "https://example.org/a_(b)?c=1&d=2"
    assert [each.get_property("textContent") for each in page.all(f"{answer} ol > li > ul > li")] == [
        "nested deep",
        "other",
    ]
    assert page.text(f"{answer} pre code") == 'def fox(n: int) -> str:\n    return "<b>" * n  # & so on'
    assert page.text(f"{answer} .code header span") == "python"
    assert page.text(f"{answer} tbody tr:last-child") == "bird2"
    assert "snake_case_name, 2 * 3 * 4, https://example.org/x." in page.text(f"{answer} > :last-child")
    assert (
        page.text("article.assistant .figures")
        == "88 tokens · 23.4 tokens/s · prompt 321 tokens/s · 180 cached"
    )
    assert page.text("#context-text") == "288 / 8,192"
    assert page.one("#context").get_attribute("aria-valuenow") == "288"
    page.say("and more")
    assert page.server.requests[1]["messages"][1]["role"] == "assistant"
    assert page.server.requests[1]["messages"][1]["content"].endswith("https://example.org/x.")
    assert page.texts[-1] == "You said: and more — é中🦊"


def test_stop_in_the_middle(page):
    from selenium.webdriver.common.keys import Keys

    for end in (lambda: page.click("#send"), lambda: page.type(Keys.ESCAPE)):
        page.server.aborted.clear()
        page.type("slow" + Keys.ENTER)
        page.wait_for(lambda: "tick3 " in page.texts[-1])
        assert page.one("#send").get_attribute("aria-label") == "Stop"
        assert re.fullmatch(r"[\d.]+ tokens/s", page.text("#figures"))
        end()
        assert page.server.aborted.wait(5), "the server sees the client leave"
        page.wait_idle()
        assert page.text("article:last-child .note") == "Stopped." and "tick3 " in page.texts[-1]
    page.say("go on")
    assert page.texts[-1].startswith("You said: go on")


def test_history_outlives_a_reload(page):
    page.say("first words")
    page.say("think twice")
    texts = page.texts
    page.browser.refresh()
    page.wait_for(lambda: page.texts == texts)
    assert (
        page.text("#title") == "first words"
        and page.text(".reasoning div") == "Let me think about <b>it</b>."
    )
    page.click("#new")
    page.wait_for(lambda: not page.all("article"))
    page.say("second talk")
    assert [each.text for each in page.all("#conversations .open")] == ["second talk", "first words"]
    page.all("#conversations .open")[1].click()
    page.wait_for(lambda: page.texts == texts)
    page.say("more")
    assert [message["content"] for message in page.server.requests[-1]["messages"]][::2] == [
        "first words",
        "think twice",
        "more",
    ]


def test_an_answer_survives_leaving_the_page_in_its_middle(page):
    from selenium.webdriver.common.keys import Keys

    page.type("slow" + Keys.ENTER)
    page.wait_for(lambda: "tick9 " in page.texts[-1])
    page.browser.refresh()
    page.wait_for(lambda: len(page.all("article")) == 2)
    assert "tick9 " in page.texts[-1] and page.text(".note") == "Stopped."


def test_hostile_text_stays_text(page):
    page.say("hostile")
    page.say("<img src=x onerror='window.hacked = 9'>")
    assert page.run("return window.hacked") is None
    inside = "#messages :is(script, img, svg, iframe, b, i, u, [onclick], [onerror], [style])"
    assert not page.all(inside)
    links = [link.get_attribute("href") for link in page.all("#messages a")]
    assert links == ["https://example.org/x.png"], "no javascript: and no data: address is a link"
    assert "<script>window.hacked = 1</script>" in page.texts[1]
    assert "[click](javascript:window.hacked=3)" in page.texts[1]
    assert page.texts[3] == "You said: <img src=x onerror='window.hacked = 9'> — é中🦊"
    page.browser.refresh()
    page.wait_for(lambda: len(page.all("article")) == 4)
    assert page.run("return window.hacked") is None and not page.all(inside)


def test_the_policy_stops_scripts_that_get_in_all_the_same(page):
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    page.run(
        "const script = document.createElement('script'); script.textContent = 'window.hacked = 2';"
        "document.body.append(script)"
    )
    assert page.run("return window.hacked") is None
    assert page.browser.get_log("browser"), "the browser says what it refused"


def test_keys(page):
    from selenium.webdriver.common.keys import Keys

    assert page.one("#send").get_attribute("disabled")
    page.type("  " + Keys.ENTER)
    assert not page.server.requests
    page.type("a" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "b")
    assert page.one("#prompt").get_property("value").strip() == "a\nb"
    page.type(Keys.ENTER)
    page.wait_for(lambda: page.server.requests)
    assert page.server.requests[0]["messages"][0]["content"] == "a\nb"
    page.wait_idle()
    assert page.one("#prompt").get_property("value") == ""


def test_regenerate_and_edit(page):
    from selenium.webdriver.common.keys import Keys

    page.say("one")
    page.say("two")
    page.button("Regenerate", "article:nth-child(2)").click()
    page.wait_for(lambda: len(page.all("article")) == 2)
    page.wait_idle()
    assert page.server.requests[-1]["messages"] == [{"role": "user", "content": "one"}]
    page.point_at("article.user")
    page.button("Edit").click()
    box = page.one(".edit textarea")
    assert box.get_property("value") == "one"
    box.send_keys(Keys.ESCAPE)
    assert page.texts[0] == "one"
    page.point_at("article.user")
    page.button("Edit").click()
    page.one(".edit textarea").send_keys(" again" + Keys.ENTER)
    page.wait_for(lambda: page.texts[0] == "one again")
    page.wait_idle()
    assert page.texts == ["one again", "You said: one again — é中🦊"]


def test_rename_delete_and_undo(page):
    from selenium.webdriver.common.keys import Keys

    page.say("plain title")
    page.point_at("#conversations li")
    page.click('[aria-label="Rename plain title"]')
    page.one("#conversations input").send_keys(Keys.CONTROL + "a" + Keys.NULL + "<b>mine</b>" + Keys.ENTER)
    assert page.text("#conversations .open") == "<b>mine</b>" == page.text("#title")
    page.say("another")
    assert page.text("#title") == "<b>mine</b>"
    page.point_at("#conversations li")
    page.click('[aria-label="Delete <b>mine</b>"]')
    assert not page.all("#conversations .open") and not page.all("article")
    page.click("#toast-action")
    assert page.text("#conversations .open") == "<b>mine</b>" and len(page.all("article")) == 4
    page.point_at("#conversations li")
    page.click('[aria-label="Delete <b>mine</b>"]')
    page.browser.refresh()
    page.wait_for(lambda: page.text("#model-name") == "demo-model")
    assert not page.all("#conversations .open") and not page.all("article")


def test_reasoning_is_folded(page):
    page.say("think about it")
    details = page.one("details.reasoning")
    assert details.get_attribute("open") is None
    assert page.text("details summary").startswith(("Thought for", "Reasoning"))
    assert not page.one("details div").is_displayed()
    page.click("details summary")
    assert page.one("details div").text == "Let me think about <b>it</b>."
    assert page.texts[-1] == "You said: think about it — é中🦊"
    page.say("next")
    assert [set(message) for message in page.server.requests[-1]["messages"]] == [{"role", "content"}] * 3


def test_errors_are_told_and_the_conversation_goes_on(page):
    page.say("fail")
    assert page.text('[role="alert"]') == "too many requests wait. Try again in 7 s."
    page.say("broken")
    assert page.all('[role="alert"]')[-1].text == "the engine failed" and page.texts[-1].startswith(
        "You said: broken"
    )
    page.say("fine")
    roles = [message["role"] for message in page.server.requests[-1]["messages"]]
    assert roles == ["user", "user", "assistant", "user"] and page.texts[-1].startswith("You said: fine")


def test_settings(page):
    page.click("#settings-open")
    page.run("byId('set-temperature').value = 1.3; byId('set-top_p').value = 0.5")
    page.one("#set-max_tokens").send_keys("77")
    page.one("#set-system").send_keys("Be brief.")
    page.button("Done").click()
    page.browser.refresh()
    page.wait_for(lambda: page.text("#model-name") == "demo-model")
    page.say("hi")
    body = page.server.requests[-1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.3, 0.5, 77)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_a_server_with_a_key(page):
    page.server.needs_key = True
    page.browser.refresh()
    page.wait_for(lambda: page.one("#settings").get_property("open"))
    assert page.text("#model-name") == "This server asks for a key"
    page.one("#set-key").send_keys("right")
    page.button("Done").click()
    page.wait_for(lambda: page.text("#model-name") == "demo-model")
    page.say("hi")
    assert page.texts[-1].startswith("You said: hi")


def test_dark_and_light(page):
    def paper():
        return page.run("return getComputedStyle(document.body).backgroundColor")

    def prefer(scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer("light")
    light = paper()
    prefer("dark")
    dark = paper()
    assert light != dark
    page.click("#theme")
    assert paper() == light
    page.browser.refresh()
    assert paper() == light
    page.click("#theme")
    prefer("light")
    assert paper() == dark
    prefer("")


def right_edge(node):
    return node.rect["x"] + node.rect["width"]


def test_a_narrow_screen(page):
    metrics = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.say("hello")
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        for selector in ("#send", "#context", "article .text", ".code"):
            assert page.one(selector).rect["x"] >= 0 and right_edge(page.one(selector)) <= 360, selector
        assert not page.one("#new").is_displayed()
        page.click("#menu")
        page.wait_for(lambda: page.one("#new").is_displayed())
        page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
        page.wait_for(lambda: not page.one("#new").is_displayed())
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_that_takes_a_click_has_a_name(page):
    page.say("hello")
    for node in page.all("button, a, input, textarea, select"):
        if node.is_displayed():
            assert node.accessible_name, node.get_attribute("outerHTML")


def test_long_hostile_markdown_is_rendered_quickly(page):
    script = """
      const texts = [
        "*a ".repeat(20000), "[".repeat(50000), "`".repeat(50000), "> ".repeat(20000), "- ".repeat(20000),
        "|".repeat(20000) + "\\n" + "|-".repeat(20000), "_".repeat(50000), "1. a\\n".repeat(5000),
        "**".repeat(30000),
      ];
      return texts.map((text) => {
        const started = performance.now();
        renderMarkdown(document.createElement("div"), text);
        return performance.now() - started;
      });
    """
    assert max(page.run(script)) < 2000


def test_the_status_page(page):
    page.browser.get(page.server.url + "status")
    panels = {}

    def live():
        panels.update(
            (each.find_element("css selector", "h2").text, each.find_element("css selector", "p").text)
            for each in page.all(".panel")
            if each.is_displayed()
        )
        return page.text("#state") == "Live" and panels.get("Writing", "–")[0].isdigit()

    page.wait_for(live)
    assert panels["Running"].startswith("3") and panels["Waiting"].startswith("1")
    assert panels["Cache in use"] == "25.0 %" and panels["Prompt found in the cache"] == "80.0 %"
    assert 15 < float(panels["Writing"].removesuffix("tokens/s")) < 25, "20 tokens a second"
    assert "Experts on the CPU" not in panels, "what the server does not count is not shown"
    assert page.text("#model") == "demo-model"
    assert page.text("#totals tr:first-child td") == "42"


def test_the_status_page_tells_when_the_server_is_gone(page):
    page.browser.get(page.server.url + "status")
    page.wait_for(lambda: page.text("#state") == "Live")
    page.server.needs_key = True
    page.wait_for(lambda: "asks for a key" in page.text("#state"))


@pytest.mark.parametrize("name", ["index.html", "status.html"])
def test_the_policy_names_the_page_s_own_code_and_nothing_else(name):
    text = (PAGES / name).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy, f"after a change of the {tag}: 'sha256-{digest}'"
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=\"|style=\"", text)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', text), "no outside assets"
