"""GLM-4.5 and GLM-4.6.

``<tool_call>NAME``, then for each argument ``<arg_key>KEY</arg_key>`` and ``<arg_value>VALUE</arg_value>``,
then ``</tool_call>``, a line each. A string stands there as it is, any other value as JSON (the models' chat
template); which of the two a value is, the function's schema decides, or else whether it reads as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from hybrid.server.parsers.calls import MALFORMED, NAME, NEED_MORE, SPACE, Outcome, Reading
from hybrid.server.parsers.format import ToolFormat
from hybrid.server.parsers.json_object import parse_json

CALL_BEGIN = "<tool_call>"

_CALL = regex.compile(
    rf"{CALL_BEGIN}{SPACE}(?P<name>{NAME}){SPACE}"
    rf"(?:<arg_key>(?>(?P<key>.*?)</arg_key>){SPACE}<arg_value>(?>(?P<value>.*?)</arg_value>){SPACE})*+</tool_call>",
    regex.DOTALL,
)


class GlmCallReader:
    """Reads a call as a whole. ``schemas``: of the arguments, by function and argument name."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas

    def read(self, text: str, *, final: bool) -> Reading:
        match = _CALL.match(text, partial=not final)
        if match is None or match.partial:
            return MALFORMED if match is None else NEED_MORE
        name = match["name"]
        schemas = self._schemas.get(name, {})
        pairs = zip(match.captures("key"), match.captures("value"), strict=True)
        arguments = {key.strip(): _value(value, schemas.get(key.strip())) for key, value in pairs}
        return Reading(Outcome.DONE, match.end(), name, None, json.dumps(arguments, ensure_ascii=False))


def _value(text: str, schema: Any) -> Any:
    types = schema.get("type") if isinstance(schema, Mapping) else None
    if types == "string":
        return text
    try:
        return parse_json(text)
    except ValueError:
        return text


def _argument_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Schemas of the arguments, by function, of tools as the OpenAI protocol has them."""
    schemas = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
            properties = function["parameters"].get("properties")
            if isinstance(properties, Mapping):
                schemas[str(function.get("name"))] = properties
    return schemas


def glm_format(tools: Sequence[Mapping[str, Any]]) -> ToolFormat:
    """The format for calls of ``tools``."""
    schemas = _argument_schemas(tools)
    return ToolFormat(CALL_BEGIN, lambda: GlmCallReader(schemas))
