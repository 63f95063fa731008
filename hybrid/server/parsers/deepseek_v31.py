"""DeepSeek-V3.1.

``<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>``, more calls,
``<｜tool▁calls▁end｜>`` (the model's chat template).
"""

from __future__ import annotations

import regex

from hybrid.server.parsers.calls import NAME, SPACE
from hybrid.server.parsers.deepseek_v3 import CALL_BEGIN, CALL_END, SECTION, SEPARATOR
from hybrid.server.parsers.format import ToolFormat
from hybrid.server.parsers.json_call import JsonCall, JsonCallReader

_CALL = JsonCall(
    header=regex.compile(rf"{CALL_BEGIN}{SPACE}(?P<name>{NAME}){SPACE}{SEPARATOR}{SPACE}(?=\{{)"),
    tail=regex.compile(rf"{SPACE}{CALL_END}"),
)
FORMAT = ToolFormat(CALL_BEGIN, lambda: JsonCallReader(_CALL), SECTION, ends_reasoning=True)
