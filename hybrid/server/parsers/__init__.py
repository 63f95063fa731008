"""Taking reasoning and tool calls out of what a model writes.

A parser is made for each completion. What it returns, in order, is what the client is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a tool call: its id and name come first and once, its arguments (JSON text) in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments_delta: str = ""


@dataclass(frozen=True)
class ParsedDelta:
    """A piece of exactly one kind."""

    content: str | None = None
    reasoning: str | None = None
    tool_call: ToolCallDelta | None = None


class OutputParser(Protocol):
    """Text in as it is written, pieces out as they become certain."""

    def feed(self, text_delta: str) -> list[ParsedDelta]: ...

    def finish(self) -> list[ParsedDelta]: ...


def parser_for(chat_template_text: str | None, architecture: str) -> OutputParser | None:
    """A new parser of what models with this template write; ``None``: everything is content."""
    return None
