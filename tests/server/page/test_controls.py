"""Keys, settings, colours and narrow screens."""

from __future__ import annotations


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
