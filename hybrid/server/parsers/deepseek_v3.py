"""DeepSeek-V3 and R1, by their chat templates.

``<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME``, a line "```json",
the arguments, a line "```", ``<｜tool▁call▁end｜>``, more calls, ``<｜tool▁calls▁end｜>``.
"""

from __future__ import annotations

import regex

from hybrid.server.parsers.calls import NAME, SPACE
from hybrid.server.parsers.format import ToolFormat
from hybrid.server.parsers.json_call import JsonCall, JsonCallReader

SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"

_CALL = JsonCall(
    header=regex.compile(
        rf"{CALL_BEGIN}{SPACE}\w{{0,32}}{SPACE}{SEPARATOR}{SPACE}(?P<name>{NAME}){SPACE}"
        rf"(?:```(?:json)?{SPACE})?(?=\{{)"
    ),
    tail=regex.compile(rf"{SPACE}(?:```{SPACE})?{CALL_END}"),
)
FORMAT = ToolFormat(CALL_BEGIN, lambda: JsonCallReader(_CALL), SECTION, ends_reasoning=True)
