"""Reasoning and tool calls of every format, however the text is cut."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid.server.parsers import OutputParser, ParsedDelta, ToolCallDelta, opens_thinking, parser_for
from hybrid.server.parsers.calls import HELD_ARGUMENTS

# What tells the families apart in their templates, and no more of them.
V3 = "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '```json'}}"
TEMPLATES = {
    "deepseek_v3": V3,
    "deepseek_r1": V3 + "{% if '</think>' in content %}{{'<｜Assistant｜><think>\\n'}}",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'+ name + '<｜tool▁sep｜> </think>",
    "hermes": '<tool_call>\n{"name": <function-name>, "arguments": ...}\n</tool_call> </think>',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>{{ id }}<|tool_call_argument_begin|></think>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n</tool_call> <think></think>",
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"zip": {"type": "string"}}}}}
]


@dataclass
class Answer:
    """Deltas joined."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    ids: dict[int, str] = field(default_factory=dict)

    def add(self, delta: ParsedDelta) -> None:
        assert sum(part is not None for part in (delta.content, delta.reasoning, delta.tool_call)) == 1
        self.content += delta.content or ""
        self.reasoning += delta.reasoning or ""
        assert delta.content != "" and delta.reasoning != ""
        if delta.tool_call is not None:
            self.add_call(delta.tool_call)

    def add_call(self, call: ToolCallDelta) -> None:
        first = call.index not in self.calls
        assert first == (call.name is not None) == (call.id is not None)
        if first:
            assert call.index == len(self.calls), "calls are numbered in order"
            self.calls[call.index], self.ids[call.index] = [call.name or "", ""], call.id or ""
        assert first or call.arguments_delta
        self.calls[call.index][1] += call.arguments_delta

    @property
    def parsed_calls(self) -> list[tuple[str, object]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls.values()]


def parse(template: str, pieces: list[str], *, tools: bool = True, thinking_open: bool = False) -> Answer:
    ids = itertools.count()
    parser = parser_for(
        TEMPLATES[template], "any", tools=tools, thinking_open=thinking_open, tool_definitions=TOOLS,
        call_id=lambda: f"call_{next(ids)}",
    )  # fmt: skip
    assert isinstance(parser, OutputParser)
    answer = Answer()
    for delta in [*(delta for piece in pieces for delta in parser.feed(piece)), *parser.finish()]:
        answer.add(delta)
    assert parser.finish() == []
    return answer


def v3_call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def v31_call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def deepseek(*calls: str) -> str:
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def kimi(*calls: tuple[str, str]) -> str:
    body = "".join(
        f"<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for n, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def glm(name: str, **arguments: str) -> str:
    pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items())
    return f"<tool_call>{name}\n{pairs}</tool_call>"


LONG = json.dumps({"text": 'wörd \\ " } {' * 60, "n": [1, {"deep": None}]})
SHORT = '{"city": "Paris", "days": 3}'
TWO_CALLS = {
    "deepseek_v3": deepseek(v3_call("f", SHORT), v3_call("g", LONG)),
    "deepseek_r1": deepseek(v3_call("f", SHORT), v3_call("g", LONG)),
    "deepseek_v31": deepseek(v31_call("f", SHORT), v31_call("g", LONG)),
    "hermes": hermes("f", SHORT) + "\n" + hermes("g", LONG),
    "kimi_k2": kimi(("f", SHORT), ("g", LONG)),
    "glm45": glm("f", city="Paris", days="3")
    + "\n"
    + glm("g", text=json.loads(LONG)["text"], n='[1, {"deep": null}]'),
}
REASONING = [name for name in TEMPLATES if name != "deepseek_v3"]


def every_cut(text: str) -> list[list[str]]:
    """In two at each place, and into single characters."""
    return [[text[:cut], text[cut:]] for cut in range(len(text))] + [list(text)]


@pytest.mark.parametrize("template", REASONING)
def test_reasoning_then_content_at_every_cut(template):
    for pieces in every_cut("<think>\nFirst a < b, </thin.\n</think>\n\nThe answer </b> is\n 4.\n"):
        answer = parse(template, pieces)
        assert (answer.reasoning, answer.content) == ("First a < b, </thin.", "The answer </b> is\n 4.\n")


@pytest.mark.parametrize("template", TEMPLATES)
def test_two_calls_at_every_cut(template):
    for pieces in every_cut(f"I will look.\n\n{TWO_CALLS[template]}\n"):
        answer = parse(template, pieces)
        assert answer.content == "I will look."
        assert answer.parsed_calls == [("f", json.loads(SHORT)), ("g", json.loads(LONG))]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "glm45"])
def test_long_arguments_come_before_they_end(template):
    parser = parser_for(TEMPLATES[template], "any", tools=True)
    deltas = [(fed, delta) for fed, char in enumerate(TWO_CALLS[template]) for delta in parser.feed(char)]
    parts = [(fed, delta.tool_call) for fed, delta in deltas if delta.tool_call.index == 1]
    assert parts[0][1].name == "g" and len(parts[0][1].arguments_delta) == HELD_ARGUMENTS + 1
    assert len(parts) == len(LONG) - HELD_ARGUMENTS
    assert "".join(part.arguments_delta for _, part in parts) == LONG


@pytest.mark.parametrize("template", TEMPLATES)
def test_content_goes_on_after_calls_and_before_others(template):
    answer = parse(template, ["one ", TWO_CALLS[template], " two\n", TWO_CALLS[template], "\nthree "])
    assert answer.content == "one" + "two" + "three "
    assert [name for name, _ in answer.parsed_calls] == ["f", "g", "f", "g"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_tools_calls_are_text(template):
    if template == "deepseek_v3":
        assert parser_for(TEMPLATES[template], "deepseek2", tools=False) is None
    else:
        assert parse(template, [TWO_CALLS[template]], tools=False).content == TWO_CALLS[template]


@pytest.mark.parametrize("template", REASONING)
@pytest.mark.parametrize("begin", ["", "\n", "<think>\n"])
def test_a_template_that_opens_the_block(template, begin):
    answer = parse(template, list(begin + "Hm.\n</think>\n\nYes."), thinking_open=True)
    assert (answer.reasoning, answer.content) == ("Hm.", "Yes.")


def test_which_prompts_open_the_block():
    assert opens_thinking("<｜User｜>Hi<｜Assistant｜><think>\n")
    assert not opens_thinking("<｜User｜>Hi<｜Assistant｜><think>\n\n</think>\n\n")
    assert not opens_thinking("say <think><｜Assistant｜>")


@pytest.mark.parametrize("template", REASONING)
def test_reasoning_that_never_ends(template):
    answer = parse(template, ["<think>on and", " on </thi"])
    assert (answer.reasoning, answer.content) == ("on and on </thi", "")


@pytest.mark.parametrize("template", REASONING)
def test_think_later_in_the_text_is_text(template):
    text = "Use <think> and </think> tags."
    assert parse(template, list(text)).content == text
    assert parse(template, ["  <b>", text]).content == "  <b>" + text


@pytest.mark.parametrize("template", ["deepseek_r1", "deepseek_v31", "kimi_k2"])
def test_a_call_ends_reasoning_where_its_markers_are_tokens(template):
    answer = parse(template, list("<think>I look it up.\n" + TWO_CALLS[template]))
    assert answer.reasoning == "I look it up." and len(answer.calls) == 2


@pytest.mark.parametrize("template", ["hermes", "glm45"])
def test_a_call_in_reasoning_is_reasoning_where_its_markers_are_text(template):
    answer = parse(template, list(f"<think>a {TWO_CALLS[template]} b</think>c"))
    assert answer.reasoning == f"a {TWO_CALLS[template]} b" and not answer.calls and answer.content == "c"


def test_kimi_s_ids_are_the_model_s():
    answer = parse("kimi_k2", [kimi(("a.b", "{}"), ("c", "{}"))])
    assert answer.ids == {0: "functions.a.b:0", 1: "functions.c:1"}
    assert [name for name, _ in answer.parsed_calls] == ["a.b", "c"]
    assert parse("hermes", [hermes("f", "{}")]).ids == {0: "call_0"}


def test_glm_values_follow_the_schema_and_else_json():
    text = glm("f", zip="0123", n="3", flag="true", text="it is </tool_call>", none="", real="1.5", bad="NaN")
    expected = {
        "zip": "0123", "n": 3, "flag": True, "text": "it is </tool_call>", "none": "", "real": 1.5,
        "bad": "NaN",
    }  # fmt: skip
    assert parse("glm45", list(text)).parsed_calls == [("f", expected)]
    assert parse("glm45", [glm("f", zip="123")]).parsed_calls == [("f", {"zip": "123"})]
    assert parse("glm45", ["<tool_call>f</tool_call>"]).parsed_calls == [("f", {})]


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', {"a": 1}),
        ('{"name": "f", "parameters": {"a": 1}}', {"a": 1}),
        ('{"name": "f", "arguments": {"a": 1}, "id": 7}', {"a": 1}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f"}', {}),
    ],
)
def test_hermes_objects_of_another_shape(body, arguments):
    for pieces in every_cut(f"<tool_call>{body}</tool_call>"):
        assert parse("hermes", pieces).parsed_calls == [("f", arguments)]


MALFORMED = {
    "hermes": [
        "<tool_call>none</tool_call>", '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>', "<tool_call>", "<tool_call>\n  ",
        '<tool_call>{"name": "f", "arguments": {"a": 1',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "line\nbreak"}}</tool_call>',
        "a\n<tool_call> b </tool_call>",
        "<tool_call>" + '{"a":' * 80 + "1" + "}" * 80 + "</tool_call>",
    ],
    "deepseek_v3": [
        "<｜tool▁calls▁begin｜> nothing", "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n[]\n```<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>two words\n```json\n{}\n```<｜tool▁call▁end｜>",
        "x <｜tool▁calls▁begin｜>  <｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{} tail",
    ],
    "deepseek_v31": ["<｜tool▁call▁begin｜>f<｜tool▁sep｜>{]<｜tool▁call▁end｜>", "<｜tool▁call▁begin｜>f{}"],
    "kimi_k2": [
        "<|tool_call_begin|>functions.f<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{'a': 1}",
    ],
    "glm45": [
        "<tool_call>two words</tool_call>", "<tool_call>f\n<arg_key>a</arg_key></tool_call>",
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1", "<tool_call>f",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text"), [(t, text) for t, texts in MALFORMED.items() for text in texts]
)
def test_what_is_no_call_is_content(template, text):
    for pieces in every_cut(text):
        answer = parse(template, pieces)
        assert answer.content == text and not answer.calls


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_good_call_after_a_bad_one(template):
    opener = TWO_CALLS[template][: TWO_CALLS[template].index(">") + 1]
    for pieces in every_cut(f"{opener} no\n{TWO_CALLS[template]}")[:60]:
        answer = parse(template, pieces)
        assert answer.content == f"{opener} no" and len(answer.calls) == 2


def test_long_arguments_that_break_leave_the_rest_as_content():
    arguments = '{"text": "' + "x" * 400 + '", "a": ] rest'
    answer = parse("deepseek_v31", [deepseek(v31_call("f", arguments)), " tail"])
    assert answer.calls[0] == ["f", arguments[: arguments.index("]")]]
    assert answer.content == "] rest<｜tool▁call▁end｜><｜tool▁calls▁end｜> tail"


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "glm45"])
@pytest.mark.parametrize("arguments", [SHORT, LONG])
def test_the_turn_may_end_in_place_of_the_closing_marker(template, arguments):
    call = {
        "hermes": hermes, "kimi_k2": lambda *call: kimi(call), "deepseek_v31": v31_call,
    }.get(template, v3_call)("f", arguments)  # fmt: skip
    call = call[: call.index(arguments) + len(arguments)]
    answer = parse(template, list(call))
    assert answer.parsed_calls == [("f", json.loads(arguments))] and answer.content == ""


FRAGMENTS = sorted(
    {
        "<",
        ">",
        "<think>",
        "</think>",
        "\n",
        " ",
        "{",
        "}",
        '"',
        "x",
        "é",
        "f",
        "<tool_call>",
        "</tool_call>",
        "{}",
    }
    | {
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        '{"name": "f", "arguments": ',
        '{"a": 1}',
        "```json",
    }
    | {
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    }
    | {
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
    }
    | {
        "<|tool_call_argument_begin|>",
        "functions.f:0",
        "function",
        "]",
        '{"a": "' + "y" * HELD_ARGUMENTS,
        "```",
    }
    | set(TWO_CALLS.values())
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_chunking_gives_the_same(data):
    template = data.draw(st.sampled_from(sorted(TEMPLATES)))
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=12)))
    cuts = sorted(data.draw(st.sets(st.integers(0, max(len(text) - 1, 0)), max_size=30)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    opened = data.draw(st.booleans())
    whole = parse(template, [text], thinking_open=opened)
    assert parse(template, pieces, thinking_open=opened) == whole
    assert parse(template, list(text), thinking_open=opened) == whole


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=10),
)
@example("hermes", [" ", "<tool_call>", " "])
@example("deepseek_v3", ["<think>"])
def test_nothing_is_lost_where_nothing_is_a_call(template, fragments):
    text = "".join("".join(fragments).split())
    answer = parse(template, [text])
    expected = text
    reasons = "</think>" in TEMPLATES[template]
    if answer.reasoning or (reasons and text.startswith("<think>")):
        expected = text.removeprefix("<think>").replace("</think>", "", 1)
    assert answer.calls or answer.reasoning + answer.content == expected


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Z", "C"], exclude_characters="<"), min_size=1, max_size=9
)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=200)
OBJECTS = st.dictionaries(
    st.text(max_size=9),
    st.recursive(SCALARS, lambda each: st.lists(each, max_size=3), max_leaves=5),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["deepseek_v3", "deepseek_v31", "hermes", "kimi_k2"]), st.data())
def test_calls_and_texts_come_out_as_they_went_in(template, data):
    write = {
        "deepseek_v3": lambda n, *call: deepseek(v3_call(*call)),
        "deepseek_v31": lambda n, *call: deepseek(v31_call(*call)),
        "hermes": lambda n, *call: hermes(*call),
        "kimi_k2": lambda n, *call: kimi(call),
    }[template]
    words, calls, text = data.draw(WORDS), [], ""
    for n in range(data.draw(st.integers(1, 3))):
        name, arguments = data.draw(NAMES), data.draw(OBJECTS)
        calls.append((name, arguments))
        text += write(n, name, json.dumps(arguments, ensure_ascii=data.draw(st.booleans())))
    step = data.draw(st.integers(1, 40))
    text = words + text
    answer = parse(template, [text[i : i + step] for i in range(0, len(text), step)])
    assert answer.content == words and answer.parsed_calls == calls


@given(st.text())
def test_text_without_markers_is_itself(text):
    for template in TEMPLATES:
        assert parse(template, list(text)).content == text
