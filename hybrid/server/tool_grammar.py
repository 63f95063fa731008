"""Grammars that make a model call tools, in llguidance's Lark: one a format of `hybrid.server.parsers`.

A call that is forced is written as the model's chat template would, with arguments that the tool's schema
accepts. Markers that are control tokens of the vocabulary stand as tokens, others as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from hybrid.server.errors import refuse
from hybrid.server.parsers import deepseek_v3, glm45, hermes, kimi_k2
from hybrid.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]

_SPACE = r"\x20|\x0A[\x20\x09]{0,32}"  # between the tokens of JSON


class Grammar:
    """A grammar being written: rules by name, and how texts stand in it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.rules: list[str] = []

    def text(self, *parts: str) -> str:
        """Literal text; a part that is a control token is that token."""
        return " ".join(self._part(part) for part in parts if part)

    def json(self, schema: Any) -> str:
        """A rule for a JSON value that ``schema`` accepts; returns its name."""
        name = f"json_{len(self.rules)}"
        guided = {**schema, "x-guidance": {"whitespace_pattern": _SPACE}}
        self.rules.append(f"{name}: %json {json.dumps(guided, ensure_ascii=False)}")
        return name

    def rule(self, body: str, attributes: str = "") -> str:
        """Returns the name of a new rule."""
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def is_token(self, text: str) -> bool:
        """Whether ``text`` is a control token, which no text can spell."""
        token_id = self._tokenizer.token_id(text)
        return token_id is not None and self._tokenizer.is_control(token_id)

    def _part(self, text: str) -> str:
        return (
            f"<[{self._tokenizer.token_id(text)}]>"
            if self.is_token(text)
            else json.dumps(text, ensure_ascii=False)
        )


def tool_grammar(name: str, tools: Tools, tokenizer: Tokenizer, *, required: bool, several: bool) -> str:
    """The grammar of an answer.

    Args:
        name: of a format, as in `hybrid.server.parsers.table`.
        tools: those that may be called.
        required: the answer is calls and nothing else; else it is text, perhaps with one call at its end.
        several: calls may follow one another, if they are required.
    """
    grammar = Grammar(tokenizer)
    form = _FORMATS[name]
    if not required:
        return _at_most_one(grammar, form, tools)
    call = _any(grammar, form, tools, form.call_begin)
    more = " ".join(filter(None, [grammar.text(form.between), call]))
    parts = [grammar.text(form.begin), call, f"({more})*" if several else "", grammar.text(form.end)]
    start = " ".join(filter(None, ["start: LEAD", *parts]))
    return "\n".join([start, r"LEAD: /[\x20\x0A]{0,4}/", *grammar.rules, ""])


def _at_most_one(grammar: Grammar, form: _Format, tools: Tools) -> str:
    opener = form.begin or form.call_begin
    call = _any(grammar, form, tools, form.call_begin if form.begin else "")
    rest = " ".join(filter(None, [call, grammar.text(form.end)]))
    if grammar.is_token(opener):
        lines = [f"start: TEXT ({grammar.text(opener)} {rest})?", "TEXT: /(?s:.*)/"]
    else:
        pattern = re.escape(opener).replace("/", r"\/")
        lines = [
            f"start: TEXT | before {rest}",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*){pattern}(?s:.*)/",
            f"before[suffix={json.dumps(opener)}]: /(?s:.*)/",
        ]
    return "\n".join([*lines, *grammar.rules, ""])


def _any(grammar: Grammar, form: _Format, tools: Tools, begin: str) -> str:
    """A rule for a call of any of the tools, after ``begin``."""
    calls = (f"({form.write(grammar, tool['function'])})" for tool in tools)
    head = grammar.text(begin)
    return grammar.rule(f"{head} ({' | '.join(calls)})" if head else f"({' | '.join(calls)})")


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Of a function's arguments: always an object."""
    return {"type": "object", **(function.get("parameters") or {})}


def _v3(grammar: Grammar, function: Mapping[str, Any]) -> str:
    head = ("function", deepseek_v3.SEPARATOR, f"{function['name']}\n```json\n")
    tail = grammar.text("\n```", deepseek_v3.CALL_END)
    return f"{grammar.text(*head)} {grammar.json(_schema(function))} {tail}"


def _v31(grammar: Grammar, function: Mapping[str, Any]) -> str:
    head = grammar.text(function["name"], deepseek_v3.SEPARATOR)
    return f"{head} {grammar.json(_schema(function))} {grammar.text(deepseek_v3.CALL_END)}"


def _kimi(grammar: Grammar, function: Mapping[str, Any]) -> str:
    head = grammar.text(f"functions.{function['name']}:")
    begin, end = grammar.text(kimi_k2.ARGUMENTS_BEGIN), grammar.text(kimi_k2.CALL_END)
    return f"{head} /[0-9]{{1,3}}/ {begin} {grammar.json(_schema(function))} {end}"


def _hermes(grammar: Grammar, function: Mapping[str, Any]) -> str:
    head = grammar.text(f'\n{{"name": {json.dumps(function["name"])}, "arguments": ')
    tail = grammar.text("}\n", hermes.CALL_END)
    return f"{head} {grammar.json(_schema(function))} {tail}"


def _glm(grammar: Grammar, function: Mapping[str, Any]) -> str:
    """Arguments in the order of the schema, those that are not required perhaps left out.

    Raises:
        ApiError: the schema lists no properties and does not say that there are none.
    """
    schema = _schema(function)
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    if not isinstance(properties, Mapping) or any(name not in properties for name in required):
        refuse("tools: for this model, a forced call needs a schema with properties", "tools")
    parts = [grammar.text(f"{function['name']}\n")]
    for key, value in properties.items():
        head = grammar.text("<arg_key>", key, "</arg_key>", "\n", "<arg_value>")
        pair = f"{head} {_glm_value(grammar, value, schema)} {grammar.text(chr(10))}"
        parts.append(pair if key in required else f"({pair})?")
    return " ".join([*parts, grammar.text("</tool_call>")])


def _glm_value(grammar: Grammar, schema: Any, whole: Mapping[str, Any]) -> str:
    """A string as it is, anything else as JSON; with the marker that ends it."""
    end = "</arg_value>"
    schema = schema if isinstance(schema, Mapping) else {}
    if schema.get("type") != "string":
        kept = {key: whole[key] for key in ("$defs", "definitions") if key in whole}
        return f"{grammar.json({**kept, **schema})} {grammar.text(end)}"
    if isinstance(schema.get("enum"), list):
        choices = " | ".join(json.dumps(str(text), ensure_ascii=False) for text in schema["enum"])
        return f"({choices}) {grammar.text(end)}"
    if grammar.is_token(end):
        return f"/(?s:.*)/ {grammar.text(end)}"
    return grammar.rule("/(?s:.*)/", f"[suffix={json.dumps(end)}]")


class _Format(NamedTuple):
    """What stands before the first call, between calls and after the last; how a call begins and goes on."""

    begin: str
    between: str
    end: str
    call_begin: str
    write: Callable[[Grammar, Mapping[str, Any]], str]


_V3, _KIMI = deepseek_v3.SECTION, kimi_k2.SECTION
_FORMATS = {
    "deepseek_v3": _Format(_V3[0], "\n", _V3[1], deepseek_v3.CALL_BEGIN, _v3),
    "deepseek_v31": _Format(_V3[0], "", _V3[1], deepseek_v3.CALL_BEGIN, _v31),
    "kimi_k2": _Format(_KIMI[0], "", _KIMI[1], kimi_k2.CALL_BEGIN, _kimi),
    "hermes": _Format("", "\n", "", hermes.CALL_BEGIN, _hermes),
    "glm45": _Format("", "\n", "", glm45.CALL_BEGIN, _glm),
}
