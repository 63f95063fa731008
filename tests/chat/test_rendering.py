from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hybrid.chat import ChatTemplate
from hybrid.errors import RequestError, TokenizerError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi <b>there</b>\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello <x>"},
    {"role": "user", "content": "Bye 字😀"},
]
TOOLS = [
    {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "x": ["<é>", 1, None]}}}
]


@pytest.mark.parametrize("family", ["deepseek", "chatml", "llama3"])
@pytest.mark.parametrize("prompt", [True, False])
def test_rendering_equals_transformers(family, prompt, tokenizer_of, templates):
    tokenizer = tokenizer_of(family)
    chat = ChatTemplate({"default": templates[family]}, tokenizer)
    (expected,), _ = render_jinja_template(
        [MESSAGES], tools=TOOLS, chat_template=templates[family], add_generation_prompt=prompt,
        bos_token=tokenizer.token_text(tokenizer.bos_id), eos_token=tokenizer.token_text(tokenizer.eos_id),
    )  # fmt: skip
    text = chat.render(MESSAGES, add_generation_prompt=prompt, tools=TOOLS)
    assert text == expected
    ids = chat.encode(MESSAGES, add_generation_prompt=prompt, tools=TOOLS)
    assert ids == tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
            "{% if i > 2 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "02",
        ),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{{ {'b': '<é>\"', 'a': [1, none, true]} | tojson }}", '{"b": "<é>\\"", "a": [1, null, true]}'),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
            '{"a":1,"b":"\\u00e9"}',
        ),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("    {% if true %}\n  x\n    {% endif %}\ny", "  x\ny"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}"
            "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
            "4",
        ),
        ("{% macro m(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ m(1) }}{{ m(3, y='z') }}", "123z"),
        ("{{ messages[::-1][0].content[:3] ~ loopless ~ 7 }}", "Bye7"),
        (
            "{{ '%s-%03d' % ('a', 7) }}{{ '{}|{:>4}'.format('b', 'c') }}{{ '%s' | format('d') }}",
            "a-007b|   cd",
        ),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') "
            "| map(attribute='content') | list | length }}",
            "2",
        ),
        ("{{ messages | map(attribute='role') | join(',') }}", "system,user,assistant,user"),
        ("{{ 'a\nb' | indent(2) }}{{ 'x'.center(3) }}{{ 'abab' | replace('a', 'c') }}", "a\n  b x cbcb"),
        ("{{ 2 ** 10 + 7 % 4 * 3 }}{{ 'ab' * 2 }}{{ [1] + [2] }}", "1033abab[1, 2]"),
    ],
)
def test_what_templates_use_works(source, expected, tokenizer_of):
    assert ChatTemplate({"default": source}, tokenizer_of("chatml")).render(MESSAGES) == expected


def test_variants_are_picked_by_name_and_by_tools(tokenizer_of):
    metadata = {
        "tokenizer.chat_template": "default",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_template.rag": "rag",
        "tokenizer.chat_template.broken": "{% if %}",
    }
    chat = ChatTemplate.from_gguf(metadata, tokenizer_of("chatml"))
    assert chat.names == ("default", "tool_use", "rag", "broken") and chat.problem is None
    assert chat.render(MESSAGES) == chat.render(MESSAGES, tools=[]) == "default"
    assert chat.render(MESSAGES, tools=TOOLS) == "tools"
    assert chat.render(MESSAGES, tools=TOOLS, template="default") == "default"
    assert chat.render(MESSAGES, template="rag") == "rag"
    with pytest.raises(RequestError, match="'other' is not in this file, which has: default, tool_use"):
        chat.render(MESSAGES, template="other")
    with pytest.raises(TokenizerError, match=r"chat_template\.broken cannot be used: line 1"):
        chat.render(MESSAGES, template="broken")


def test_bos_is_added_where_the_vocabulary_asks_and_the_template_does_not(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    tokenizer.add_bos = True
    for source in ("hi", "{{ bos_token }}hi"):
        ids = ChatTemplate({"default": source}, tokenizer).encode(MESSAGES)
        assert ids == [tokenizer.bos_id, ord("h"), ord("i")]


def test_extra_arguments_reach_the_template_and_cannot_replace_its_own(tokenizer_of):
    chat = ChatTemplate({"default": "{{ enable_thinking }} {{ style }}"}, tokenizer_of("chatml"))
    assert chat.render(MESSAGES, enable_thinking=False, style="dry") == "False dry"
    for name in ("bos_token", "range", "raise_exception"):
        with pytest.raises(RequestError, match=f"'{name}' is set by the runtime"):
            chat.render(MESSAGES, **{name: "x"})
    with pytest.raises(RequestError, match="expected a JSON value, found"):
        chat.render(MESSAGES, style=object())


def test_a_template_may_refuse_messages(tokenizer_of):
    chat = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, tokenizer_of("chatml"))
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        chat.render(MESSAGES)


GOOD = {"role": "user", "content": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEEP = {"a": 1}
for _ in range(2000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        (None, "non-empty list"),
        ("hi", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([GOOD, {"content": "x"}], r"messages\[1\]\.role: expected one of system, .*, found NoneType"),
        ([{"role": "root", "content": "x"}], r"role: expected one of .*'root'"),
        ([{"role": ["user"], "content": "x"}], "role: expected one of"),
        ([{"role": "user"}], r"messages\[0\]: content is missing"),
        ([{"role": "user", "content": None}], "content is missing"),
        ([{"role": "user", "content": 7}], "content: expected a string or a list of parts, found int"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"content\[0\]: expected"),
        ([{"role": "user", "content": "a\ud800"}], "lone surrogate at character 1"),
        ([{"role": "user", "content": "x", "name": "\udfff"}], "lone surrogate"),
        ([{"role": "user", "content": "x", "meta": b"x"}], r"messages\[0\]\.meta: expected a JSON value"),
        ([{"role": "user", "content": "x", 5: 1}], "key: expected a string, found int"),
        ([{"role": "user", "content": "x", "meta": DEEP}], "nested more than 64"),
        ([{"role": "tool", "content": "x"}], "needs the tool_call_id"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only an assistant message"),
        ([{"role": "assistant", "tool_calls": []}], "expected a non-empty list"),
        ([{"role": "assistant", "tool_calls": ["f"]}], r"tool_calls\[0\]\.function: expected an object"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}],
            "arguments: expected",
        ),
    ],
)
def test_malformed_messages_are_refused(messages, message, tokenizer_of):
    chat = ChatTemplate({"default": "{{ messages[0].content }}"}, tokenizer_of("chatml"))
    for use in (chat.render, chat.encode):
        with pytest.raises(RequestError, match=message):
            use(messages)


def test_parts_join_and_calls_may_come_without_content(tokenizer_of):
    chat = ChatTemplate(
        {"default": "{{ messages[0].content }}|{{ messages[1].content }}"}, tokenizer_of("chatml")
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "tool_calls": [CALL]}
    assert chat.render([{"role": "user", "content": parts}, call]) == "a\nb|None"


@pytest.mark.parametrize("tools", ["x", {"a": 1}, [1], [{"a": b""}]])
def test_malformed_tools_are_refused(tools, tokenizer_of):
    with pytest.raises(RequestError, match="tools"):
        ChatTemplate({"default": ""}, tokenizer_of("chatml")).render([GOOD], tools=tools)
