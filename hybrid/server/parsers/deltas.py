"""What a parser says about a piece of model text. The names are those of the OpenAI chat protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of a tool call.

    Attributes:
        index: 0 for the first call of an answer, 1 for the second, ...
        id, name: in the first part of a call, ``None`` in the others.
        arguments_delta: what this part adds to the call's arguments, a JSON object as text.
    """

    index: int
    id: str | None
    name: str | None
    arguments_delta: str


@dataclass(frozen=True)
class ParsedDelta:
    """A piece of an answer: exactly one field is not ``None``, and a text is not empty."""

    content: str | None = None
    reasoning: str | None = None
    tool_call: ToolCallDelta | None = None
