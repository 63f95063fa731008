"""Hostile templates end in a clear error, in bounded time and memory, in any thread."""

from __future__ import annotations

import resource
import sys
import threading
import time

import pytest

from hybrid.chat import ChatTemplate, Limits
from hybrid.errors import TokenizerError

GRAPH = (
    "{% set ns = namespace(a=(1,), b=(1,)) %}"
    "{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% set ns.b = (ns.b, ns.b) %}{% endfor %}"
)
BIG = "{% set s = 'a' * 8000000 %}{% set ns = namespace(x=[]) %}"
HOSTILE = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{% set x = [0] * 10**10 %}",
    "{{ 9 ** 99999999 }}",
    "{{ 10 ** 10 ** 10 ** 10 ** 10 }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}x{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a'.center(10000000000) }}",
    "{{ 'a'.zfill(10000000000) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' | format(10000000000, 1) }}",
    "{{ 'a\nb' | indent(10000000000) }}",
    "{{ [1] | tojson(indent=10000000000) }}",
    "{{ (range(9999) | list) | tojson(separators=('a' * 100000, ':')) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "{{ (range(99999) | list) | join('b' * 1000000) }}",
    "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "{{ [1] | batch(10000000000, 0) | list }}",
    "{{ [1] | slice(10000000000) | list }}",
    "{{ 1 | round(1000000000, 'ceil') }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ lipsum(100000000) }}",
    "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "{{ range(9999) | map('center', 9999) | join }}",
    GRAPH + "{{ ns.a == ns.b }}",
    GRAPH + "{{ ns.a }}",
    GRAPH + "{{ ns.a | tojson }}",
    GRAPH + "{{ {}[ns.a] }}",
    GRAPH + "{{ {ns.a: 1} }}",
    GRAPH + "{{ ns.a in {} }}",
    GRAPH + "{{ ns.a is eq(ns.b) }}",
    BIG + "{% for i in range(99999) %}{% set ns.x = [ns.x, s[1:]] %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% set ns.x = [ns.x, s | upper] %}{% endfor %}",
    BIG + "{% for i in range(99999) %}{% set ns.x = [ns.x, s.title()] %}{% endfor %}",
    BIG + "{% set x = [" + "s[1:]," * 200 + "] %}",
    "{% for a in range(99999) %}{% for b in range(99) %}" + "x" * 500 + "{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ undefined.attribute }}",
    "{{ 1 / 0 }}",
]
BROKEN = [
    "{% if %}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ 1" + " + 1" * 20_000 + " }}",
    "{% if 1 %}" * 400 + "{% endif %}" * 400,
    "{% nonsense %}",
    "{{ 'a' | urlize }}",
    "{{",
    "{% endfor %}",
    "x" * (1 << 20),
    7,
    None,
    ["a"],
]
MESSAGES = [{"role": "user", "content": "hi"}]


def render_in_thread(source, tokenizer, limits=None):
    """What rendering raised, CPU seconds, and growth of the peak of memory in MiB; in a thread of its own."""
    outcome = []

    def work():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.thread_time()
        try:
            ChatTemplate({"default": source}, tokenizer, limits=limits).render(MESSAGES)
            error = None
        except BaseException as caught:
            error = caught
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        outcome.append((error, time.thread_time() - start, grown / 1024))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return outcome[0]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end(source, tokenizer_of):
    limits = Limits(seconds=0.3)
    error, seconds, grown = render_in_thread(source, tokenizer_of("chatml"), limits)
    assert isinstance(error, TokenizerError), error
    assert "chat template" in str(error)
    assert seconds < 2.0
    assert grown < 400


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_template_is_told_when_it_is_used(source, tokenizer_of):
    chat = ChatTemplate.from_gguf({"tokenizer.chat_template": source}, tokenizer_of("chatml"))
    assert chat.problem is not None and "tokenizer.chat_template" in chat.problem
    for use in (chat.render, chat.encode):
        with pytest.raises(TokenizerError, match=r"no chat with this model: tokenizer\.chat_template"):
            use(MESSAGES)


def test_a_file_without_a_template_says_so(tokenizer_of):
    chat = ChatTemplate.from_gguf({}, tokenizer_of("chatml"))
    assert chat.names == ()
    with pytest.raises(TokenizerError, match=r"the file has no tokenizer\.chat_template"):
        chat.render(MESSAGES)


def test_a_render_leaves_tracing_as_it_was(tokenizer_of):
    seen = []

    def tracer(frame, event, argument):
        seen.append(event)

    chat = ChatTemplate({"default": "{{ messages[0].content }}"}, tokenizer_of("chatml"))
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        chat.render(MESSAGES)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer


def test_limits_grow_with_the_conversation(tokenizer_of, templates):
    chat = ChatTemplate(
        {"default": templates["chatml"]}, tokenizer_of("chatml"), limits=Limits(max_chars=4096)
    )
    long = [{"role": "user", "content": "word " * 40_000}] * 5
    assert len(chat.render(long)) > 5 * 199_000


def test_threads_render_at_once(tokenizer_of, templates):
    chat = ChatTemplate({"default": templates["chatml"]}, tokenizer_of("chatml"))
    expected = chat.render(MESSAGES)
    results = []
    threads = [threading.Thread(target=lambda: results.append(chat.render(MESSAGES))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 8
