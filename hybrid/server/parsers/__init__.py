"""Reasoning and tool calls in model text, while it streams. One file for each family's format.

`parser_for` picks by the model's chat template; `OutputParser` does the work common to all.
"""

from __future__ import annotations

from hybrid.server.parsers.deltas import ParsedDelta, ToolCallDelta
from hybrid.server.parsers.output_parser import OutputParser
from hybrid.server.parsers.table import opens_thinking, parser_for

__all__ = ["OutputParser", "ParsedDelta", "ToolCallDelta", "opens_thinking", "parser_for"]
