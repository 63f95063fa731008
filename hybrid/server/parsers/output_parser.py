"""Model text, as it comes, to content, reasoning and tool calls."""

from __future__ import annotations

import enum
import secrets
from collections.abc import Callable, Sequence

from hybrid.server.parsers.calls import CallReader, Outcome, Reading
from hybrid.server.parsers.deltas import ParsedDelta, ToolCallDelta
from hybrid.server.parsers.format import THINK_BEGIN, THINK_END, ToolFormat
from hybrid.server.parsers.markers import certain_length, find_first


class _State(enum.Enum):
    START = enum.auto()
    REASONING = enum.auto()
    CONTENT = enum.auto()
    OPENING = enum.auto()
    CALL = enum.auto()
    AFTER_CALL = enum.auto()


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class OutputParser:
    """Parses one answer.

    Joined, the deltas hold all of the text but the markers and the white space next to them, once and in
    order, however the text was cut. What looks like a call and is none is content. Reasoning is looked for
    at the beginning of the answer alone.

    Args:
        tools: how calls are written; ``None``: they are not looked for.
        reasoning: look for a ``<think>`` block.
        thinking_open: the prompt has opened the block.
        call_id: makes the id of a call whose format has none.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        *,
        reasoning: bool,
        thinking_open: bool = False,
        call_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._tools, self._call_id = tools, call_id
        self._thinking_open = thinking_open
        self._final = False
        self._pending = ""
        self._trim = False  # white space that comes next belongs to the marker before it
        self._lead: str | None = None  # in a call of which nothing is out: what came before its marker
        self._reader: CallReader | None = None
        self._enter(_State.START if reasoning or thinking_open else _State.CONTENT, "")
        self._num_calls = 0
        self._deltas: list[ParsedDelta] = []

    def feed(self, text_delta: str) -> list[ParsedDelta]:
        """Take in text; what is certain by now, perhaps nothing."""
        self._pending += text_delta
        return self._run()

    def finish(self) -> list[ParsedDelta]:
        """The text has ended: what was held back."""
        self._final = True
        return self._run()

    def _run(self) -> list[ParsedDelta]:
        steps = {
            _State.START: self._start,
            _State.REASONING: self._reasoning,
            _State.CONTENT: self._content,
            _State.OPENING: self._opening,
            _State.CALL: self._call,
            _State.AFTER_CALL: self._after_call,
        }
        while self._pending and steps[self._state]():
            pass
        deltas, self._deltas = _joined(self._deltas), []
        return deltas

    # Each step returns whether there is more to do with the text at hand.

    def _start(self) -> bool:
        text = self._pending.lstrip()
        if text.startswith(THINK_BEGIN):
            self._enter(_State.REASONING, text[len(THINK_BEGIN) :], trim=True)
        elif THINK_BEGIN.startswith(text) and not self._final:
            return False
        elif self._thinking_open:
            self._enter(_State.REASONING, self._pending, trim=True)
        else:
            self._enter(_State.CONTENT, self._pending)
        return True

    def _reasoning(self) -> bool:
        ends_too = self._tools.openers if self._tools is not None and self._tools.ends_reasoning else ()
        markers = (THINK_END, *ends_too)
        if self._trimmed_to_nothing():
            return False
        found = find_first(self._pending, markers)
        if found is None:
            self._emit_certain(markers, self._emit_reasoning)
            return False
        position, marker = found
        self._emit_reasoning(self._pending[:position].rstrip())
        length = len(THINK_END) if marker == THINK_END else 0
        self._enter(_State.CONTENT, self._pending[position + length :], trim=True)
        return True

    def _content(self) -> bool:
        if self._trimmed_to_nothing():
            return False
        openers = () if self._tools is None else self._tools.openers
        found = find_first(self._pending, openers)
        if found is None:
            self._emit_certain(openers, self._emit_content)
            return False
        text = self._pending[: found[0]].rstrip()
        self._emit_content(text)
        self._enter(_State.OPENING, self._pending[len(text) :])
        return True

    def _opening(self) -> bool:
        """``_pending`` begins with an opening marker, perhaps after white space."""
        assert self._tools is not None
        begin = _call_position(self._pending, self._tools)
        if begin is None and not self._final:
            return False
        if begin is None or begin < 0:
            opener = find_first(self._pending, self._tools.openers)
            assert opener is not None
            self._give_back(opener[0] + len(opener[1]))
        else:
            self._lead, self._pending = self._pending[:begin], self._pending[begin:]
            self._reader = self._tools.new_reader()
            self._state = _State.CALL
        return True

    def _call(self) -> bool:
        """``_pending`` begins with ``call_begin``, or goes on inside a call of which a part was emitted."""
        assert self._tools is not None and self._reader is not None
        reading = self._reader.read(self._pending, final=self._final)
        if reading.outcome is Outcome.NEED_MORE:
            return False
        if reading.outcome is Outcome.MALFORMED:
            self._give_back(0 if self._lead is None else len(self._tools.call_begin))
            return True
        self._emit_call(reading)
        self._pending = self._pending[reading.consumed :]
        if reading.outcome is Outcome.DONE:
            self._num_calls += 1
            self._enter(_State.AFTER_CALL, self._pending)
        return True

    def _after_call(self) -> bool:
        """A section may end here, or another call or content follows."""
        assert self._tools is not None
        section_end = self._tools.section[1] if self._tools.section is not None else ""
        text = self._pending.lstrip()
        if section_end and section_end.startswith(text) and text != section_end and not self._final:
            return False
        self._enter(_State.CONTENT, text.removeprefix(section_end), trim=True)
        return True

    def _give_back(self, length: int) -> None:
        """What looked like a call is content: what came before its marker, and ``length`` characters."""
        self._emit_content((self._lead or "") + self._pending[:length])
        if self._lead is None and self._reader is not None:
            self._num_calls += 1  # a part of it is out
        self._enter(_State.CONTENT, self._pending[length:])

    def _enter(self, state: _State, pending: str, *, trim: bool = False) -> None:
        self._state, self._pending, self._trim = state, pending, trim
        self._lead = self._reader = None

    def _trimmed_to_nothing(self) -> bool:
        if self._trim:
            self._pending = self._pending.lstrip()
            self._trim = not self._pending
        return not self._pending

    def _emit_certain(self, markers: Sequence[str], emit: Callable[[str], None]) -> None:
        certain = self._final or not markers
        length = len(self._pending) if certain else certain_length(self._pending, markers)
        emit(self._pending[:length])
        self._pending = self._pending[length:]

    def _emit_content(self, text: str) -> None:
        if text:
            self._deltas.append(ParsedDelta(content=text))

    def _emit_reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(ParsedDelta(reasoning=text))

    def _emit_call(self, reading: Reading) -> None:
        call_id = None
        if reading.name is not None:
            call_id, self._lead = reading.id or self._call_id(), None
        if reading.name is not None or reading.arguments:
            call = ToolCallDelta(self._num_calls, call_id, reading.name, reading.arguments)
            self._deltas.append(ParsedDelta(tool_call=call))


def _call_position(text: str, tools: ToolFormat) -> int | None:
    """Where ``call_begin`` stands after white space and the section's marker.

    -1: it cannot stand there; ``None``: not yet known.
    """
    position = len(text) - len(text.lstrip())
    if tools.section is not None and text.startswith(tools.section[0], position):
        position += len(tools.section[0])
        position += len(text[position:]) - len(text[position:].lstrip())
    rest = text[position:]
    if rest.startswith(tools.call_begin):
        return position
    return None if tools.call_begin.startswith(rest) else -1


def _joined(deltas: list[ParsedDelta]) -> list[ParsedDelta]:
    """Neighbouring texts of one kind as one."""
    result: list[ParsedDelta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if last is not None and last.content is not None and delta.content is not None:
            result[-1] = ParsedDelta(content=last.content + delta.content)
        elif last is not None and last.reasoning is not None and delta.reasoning is not None:
            result[-1] = ParsedDelta(reasoning=last.reasoning + delta.reasoning)
        else:
            result.append(delta)
    return result
