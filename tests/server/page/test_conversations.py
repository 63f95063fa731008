"""Conversations in a real browser, against a mock server."""

from __future__ import annotations

import re


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
        assert page.server.aborted.wait(20), "the server sees the client leave"
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


def test_turns_that_an_edit_drops_can_be_brought_back(page):
    from selenium.webdriver.common.keys import Keys

    page.say("one")
    page.say("two")
    texts = page.texts
    page.point_at("article.user")
    page.button("Edit").click()
    page.one(".edit textarea").send_keys(Keys.CONTROL + "a" + Keys.NULL + "slow" + Keys.ENTER)
    page.wait_for(lambda: "tick3 " in page.texts[-1])
    assert page.text("#toast-text") == "Later messages were dropped."
    page.click("#toast-action")
    assert page.texts == texts and page.server.aborted.wait(20)
    page.wait_idle()
    page.browser.refresh()
    page.wait_for(lambda: page.texts == texts)


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
