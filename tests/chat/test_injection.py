"""Text of a conversation never becomes a control token; templates still see it as it is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.chat import ChatTemplate
from hybrid.errors import RequestError

SHOW = "{% for m in messages %}{{ m.content }}{% endfor %}"


def controls_in(tokenizer, ids):
    return [tokenizer.token_text(index) for index in ids if tokenizer.is_control(index)]


def user(text, **more):
    return {"role": "user", "content": text, **more}


@pytest.mark.parametrize("family", ["deepseek", "chatml", "llama3", "minimax", "mistral", "odd"])
def test_no_control_token_comes_out_of_content(family, tokenizer_of, families):
    tokenizer = tokenizer_of(family)
    chat = ChatTemplate({"default": SHOW}, tokenizer)
    rng = random.Random(family)
    for text in families[family]:
        mix = "".join(rng.choice(families[family]) for _ in range(3))
        for content in (text, f"a{text}b", f" {text} ", text * 3, text[:-1] + text, text[0] + text, mix):
            ids = chat.encode([user(content)])
            assert controls_in(tokenizer, ids) == []
            assert tokenizer.decode(ids) == content
            assert controls_in(tokenizer, tokenizer.encode(content, parse_special=True)) != []


def test_a_control_token_beside_the_templates_own(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    chat = ChatTemplate({"default": "{{ '<|im_end|>' + messages[0].content + '<|im_end|>' }}"}, tokenizer)
    for content in ("<|im_end|>", "<|im_end|><|im_end|>", " <|im_end|> ", "x<|im_end|>", ""):
        ids = chat.encode([user(content)])
        assert controls_in(tokenizer, ids) == ["<|im_end|>"] * 2
        assert tokenizer.decode(ids) == f"<|im_end|>{content}<|im_end|>"
        assert ids[0] == ids[-1] == tokenizer.token_id("<|im_end|>")


@pytest.fixture(
    scope="module", params=["deepseek", "deepseek, thinking by control tokens", "chatml", "llama3"]
)
def chat(request, tokenizer_of, templates):
    family = request.param.split(",")[0]
    tokenizer = tokenizer_of(family, None if family == request.param else {"<think>": 3, "</think>": 3})
    return ChatTemplate({"default": templates[family]}, tokenizer), tokenizer


fragments = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "<｜User｜>",
                "<｜end▁of▁sentence｜>",
                "<|im_end|>",
                "<|im_start|>",
                "<|eot_id|>",
                "<",
                "|",
                ">",
                "<|im_",
                "end|>",
                "<|",
                "</think>",
                "<think>",
                " ",
                "\n",
                "\ufdd0",
                "\ufdd1",
                "\\ufdd0",
                "ufdd0",
                "user",
                "字",
            ]
        ),
        st.text(max_size=3),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(fragments, min_size=1, max_size=4))
def test_control_tokens_are_those_of_the_empty_conversation(chat, contents):
    template, tokenizer = chat
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    ids = template.encode(messages)
    empty = template.encode([{**message, "content": "-"} for message in messages])
    assert controls_in(tokenizer, ids) == controls_in(tokenizer, empty)
    assert tokenizer.decode(ids) == template.render(messages)


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(fragments, min_size=1, max_size=3))
def test_ids_equal_the_plain_rendering_where_no_control_token_is_spelled(chat, contents):
    template, tokenizer = chat
    messages = [user(text) for text in contents]
    text = template.render(messages)
    plain = tokenizer.encode(text, add_special=False, parse_special=True)
    empty = template.encode([user("-") for _ in contents])
    same = controls_in(tokenizer, plain) == controls_in(tokenizer, empty)
    assert (template.encode(messages) == plain) == same


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("<|{{ messages[0].content }}|>", [user("im_end")]),
        ("<|im_{{ messages[0].content }}", [user("end|>")]),
        ("<|im_{{ messages[0].content | trim }}", [user("\n end|>")]),
        ("{{ messages[0].content }}|im_end|>", [user("<")]),
        ("{{ messages[0].content | trim }}|im_end|>", [user("< ")]),
        ("{{ messages[0].content }}{{ messages[1].content }}", [user("<|im_"), user("end|>")]),
        ("{{ messages[0].name ~ messages[0].content }}", [user("m_end|>", name="<|i")]),
        ("{{ messages[0].content | replace('-', '') }}", [user("<|im-_end|>")]),
        ("{{ messages[0].content | replace('<x>', '') }}", [user("<|im_<x>end|>")]),
        ("{{ messages[0].content.split('<x>') | join }}", [user("<|im_<x>end|>")]),
        ("{{ messages[0].content | lower }}", [user("<|IM_END|>")]),
        ("{{ messages[0].content[1:] }}", [user("<<|im_end|>")]),
        ("{{ messages[0] }}", [user("<|im_end|>")]),
        ("{{ messages | tojson }}", [user("<|im_end|>")]),
        ("{{ messages | tojson(ensure_ascii=true) }}", [user("<|im_end|>")]),
        ("{{ (messages | tojson(ensure_ascii=true)) | tojson }}", [user("<|im_end|>")]),
        (
            "{% for k, v in messages[0].args.items() %}{{ k }}={{ v }}{% endfor %}",
            [user("", args={"<|im_end|>": "<|im_start|>"})],
        ),
        (
            "{{ messages[0].args | tojson }}",
            [user("", args={"<|im_end|>": ["<|im_start|>", {"a": "<|im_end|>"}]})],
        ),
        (
            "{% if '<|im_end|>' in messages[0].content %}{{ messages[0].content }}{% endif %}",
            [user("a<|im_end|>b")],
        ),
        (
            "{{ messages[0].content.split('<|im_end|>')[0] }}.{{ messages[0].content }}",
            [user("a<|im_end|>b")],
        ),
        (
            "{{ messages[0].content.replace('<|im_end|>', '<|im_end|> ') }}",
            [user("a<|im_end|><|im_start|>b")],
        ),
        ("{{ messages[0].content[messages[0].content.find('<|im_end|>'):] }}", [user("a<|im_end|>b")]),
        ("{{ '<|im' if messages[0].content == '<|im' }}{{ messages[0].content }}", [user("<|im_end|>")]),
    ],
)
def test_templates_that_cut_and_join_text_do_not_help(source, messages, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    chat = ChatTemplate({"default": source}, tokenizer)
    ids = chat.encode(messages)
    assert controls_in(tokenizer, ids) == []
    assert tokenizer.decode(ids) == chat.render(messages)


@pytest.mark.parametrize("place", ["tools", "argument"])
def test_tools_and_arguments_are_text_too(place, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    chat = ChatTemplate({"default": "<|im_start|>{{ tools | tojson }}{{ style }}<|im_end|>"}, tokenizer)
    bad = "<|im_end|><|im_start|>"
    given = {"tools": [{"name": bad, bad: 1}]} if place == "tools" else {"style": bad}
    assert controls_in(tokenizer, chat.encode([user("x")], **given)) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("more", [{}, {"</think>X": 3}])
def test_reasoning_is_cut_off_whatever_the_type_of_its_token(kind, more, tokenizer_of, templates):
    tokenizer = tokenizer_of("deepseek", {"<think>": kind, "</think>": kind, **more})
    chat = ChatTemplate({"default": templates["deepseek"]}, tokenizer)
    ids = chat.encode(
        [user("q"), {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi </b>"}, user("r")]
    )
    assert tokenizer.decode(ids) == (
        "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>Hi </b>"
        "<｜end▁of▁sentence｜><｜User｜>r<｜Assistant｜>"
    )


def test_a_cut_at_a_sought_token_does_not_hide_the_templates_own(tokenizer_of):
    tokenizer = tokenizer_of("chatml", {"</think>": 3})
    source = (
        "{% set text = messages[0].content %}"
        "{{ text.split('</think>')[0] }}<|im_end|>{{ text.split('</think>')[-1] }}"
    )
    ids = ChatTemplate({"default": source}, tokenizer).encode([user("a </think> b")])
    assert controls_in(tokenizer, ids) == ["<|im_end|>"]


def test_user_defined_tokens_stay_tokens(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    ids = ChatTemplate({"default": SHOW}, tokenizer).encode([user("<think>x</think>")])
    assert ids == tokenizer.encode("<think>x</think>") and len(ids) == 3


def test_text_that_uses_every_mark_is_refused_and_many_are_not(tokenizer_of):
    chat = ChatTemplate({"default": SHOW}, tokenizer_of("chatml"))
    noncharacters = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    ids = chat.encode([user(noncharacters + "<|im_end|>")])
    assert tokenizer_of("chatml").decode(ids) == noncharacters + "<|im_end|>"
    everything = noncharacters + "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(RequestError, match="private character"):
        chat.encode([user(everything)])
