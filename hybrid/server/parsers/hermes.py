"""Qwen2.5, Qwen3 and the Hermes family.

``<tool_call>``, ``{"name": NAME, "arguments": ARGUMENTS}``, ``</tool_call>``, a line each; calls simply
follow one another (the models' chat templates).
"""

from __future__ import annotations

import json
from typing import Any

import regex

from hybrid.server.parsers.calls import SPACE
from hybrid.server.parsers.format import ToolFormat
from hybrid.server.parsers.json_call import JsonCall, JsonCallReader
from hybrid.server.parsers.json_object import parse_object

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"

# As the templates write it: the arguments can be passed on as they come.
_NAME_FIRST = JsonCall(
    header=regex.compile(
        rf'{CALL_BEGIN}{SPACE}\{{{SPACE}"name"{SPACE}:{SPACE}"(?P<name>[^"\\\p{{Cc}}]{{1,128}})"{SPACE},{SPACE}'
        rf'"arguments"{SPACE}:{SPACE}(?=\{{)'
    ),
    tail=regex.compile(rf"{SPACE}\}}{SPACE}{CALL_END}"),
)


def _name_and_arguments(text: str) -> tuple[str, str] | None:
    """Of an object with its keys in any order, arguments perhaps as a string or under ``parameters``."""
    call = parse_object(text) or {}
    name = call.get("name")
    arguments: Any = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = parse_object(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


_ANY_ORDER = JsonCall(
    header=regex.compile(rf"{CALL_BEGIN}{SPACE}(?=\{{)"),
    tail=regex.compile(rf"{SPACE}{CALL_END}"),
    unwrap=_name_and_arguments,
)
FORMAT = ToolFormat(CALL_BEGIN, lambda: JsonCallReader(_NAME_FIRST, _ANY_ORDER))
