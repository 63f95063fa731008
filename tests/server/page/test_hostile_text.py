"""Text of models and users stays text, and nothing of it runs."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[3] / "hybrid" / "server" / "page"


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
