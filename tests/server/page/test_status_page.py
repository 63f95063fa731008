"""The status page in a real browser, against a mock server."""

from __future__ import annotations


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
    assert 10 < float(panels["Writing"].removesuffix("tokens/s")) < 40, "20 tokens a second"
    assert "Experts on the CPU" not in panels, "what the server does not count is not shown"
    assert page.text("#model") == "demo-model"
    assert page.text("#totals tr:first-child td") == "42"


def test_the_status_page_tells_when_the_server_is_gone(page):
    page.browser.get(page.server.url + "status")
    page.wait_for(lambda: page.text("#state") == "Live")
    page.server.needs_key = True
    page.wait_for(lambda: "asks for a key" in page.text("#state"))
