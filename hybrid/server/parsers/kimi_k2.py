"""Kimi-K2.

``<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>ARGUMENTS
<|tool_call_end|>``, more calls, ``<|tool_calls_section_end|>``. ``functions.NAME:INDEX`` is the call's id,
and the model expects to find it again in the history (the model's chat template and tool call guide).
"""

from __future__ import annotations

import regex

from hybrid.server.parsers.calls import NAME, SPACE
from hybrid.server.parsers.format import ToolFormat
from hybrid.server.parsers.json_call import JsonCall, JsonCallReader

SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
CALL_BEGIN = "<|tool_call_begin|>"
CALL_END = "<|tool_call_end|>"
ARGUMENTS_BEGIN = "<|tool_call_argument_begin|>"

_CALL = JsonCall(
    header=regex.compile(
        rf"{regex.escape(CALL_BEGIN)}{SPACE}(?P<id>(?:functions\.)?(?P<name>{NAME}):\d{{1,9}}){SPACE}"
        rf"{regex.escape(ARGUMENTS_BEGIN)}{SPACE}(?=\{{)"
    ),
    tail=regex.compile(rf"{SPACE}{regex.escape(CALL_END)}"),
)
FORMAT = ToolFormat(CALL_BEGIN, lambda: JsonCallReader(_CALL), SECTION, ends_reasoning=True)
