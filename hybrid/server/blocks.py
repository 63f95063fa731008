"""A completion as a sequence of blocks, one kind each: how the Messages and Responses protocols see it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from hybrid.server.parsers import ParsedDelta

Kind = Literal["text", "reasoning", "tool_call"]
Step = Literal["start", "delta", "stop"]


@dataclass
class Block:
    """A run of text, of reasoning, or a tool call; ``text`` is what there is of it, or of its arguments."""

    index: int
    kind: Kind
    text: str = ""
    call_index: int | None = None
    call_id: str = ""
    name: str = ""

    def arguments(self) -> dict[str, Any]:
        """A tool call's arguments; empty where the model did not write a JSON object."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


class Blocks:
    """Sorts pieces into blocks as they come."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open = False

    def take(self, pieces: Iterable[ParsedDelta]) -> Iterator[tuple[Step, Block, str]]:
        """The steps that pieces are: a block starts, gets more text, stops."""
        for piece in pieces:
            if self._needs_new(piece):
                yield from self.finish()
                self.all.append(_new_block(len(self.all), piece))
                self._open = True
                yield "start", replace(self.all[-1]), ""  # as it is now: empty
            block, text = self.all[-1], _text(piece)
            if text:
                block.text += text
                yield "delta", block, text

    def finish(self) -> Iterator[tuple[Step, Block, str]]:
        """The step that ends the last block, if there is one."""
        if self._open:
            self._open = False
            yield "stop", self.all[-1], ""

    def _needs_new(self, piece: ParsedDelta) -> bool:
        if not self._open or self.all[-1].kind != _kind(piece):
            return True
        return piece.tool_call is not None and piece.tool_call.index != self.all[-1].call_index


def _kind(piece: ParsedDelta) -> Kind:
    if piece.tool_call is not None:
        return "tool_call"
    return "text" if piece.reasoning is None else "reasoning"


def _text(piece: ParsedDelta) -> str:
    if piece.tool_call is not None:
        return piece.tool_call.arguments_delta
    return (piece.content if piece.reasoning is None else piece.reasoning) or ""


def _new_block(index: int, piece: ParsedDelta) -> Block:
    call = piece.tool_call
    if call is None:
        return Block(index, _kind(piece))
    return Block(index, "tool_call", call_index=call.index, call_id=call.id or "", name=call.name or "")
