"""``POST /v1/messages``: Anthropic's protocol, for one choice of a chat."""

from __future__ import annotations

from typing import Any

from hybrid.server import sse
from hybrid.server.blocks import Block, Blocks, Step
from hybrid.server.chat import ChatAnswer
from hybrid.server.context import ServerContext
from hybrid.server.errors import ApiError, refuse
from hybrid.server.generation import Job, Output
from hybrid.server.json_response import to_json
from hybrid.server.protocol import ChatBody, JsonObject, MessagesBody
from hybrid.server.respond import Answer

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}


class MessagesAnswer(Answer):
    """Messages, streamed or whole; the work is a chat completion's."""

    def __init__(self, context: ServerContext, body: MessagesBody) -> None:
        self._chat = ChatAnswer(context, to_chat(body), "msg_")
        self._body = body
        self.record, self.stream = self._chat.record, body.stream
        self._blocks = Blocks()
        self._stop_sequence: str | None = None
        self._num_prompt_tokens = 0

    def jobs(self) -> list[Job]:
        jobs = self._chat.jobs()
        self._num_prompt_tokens = len(jobs[0].prompt["prompt_token_ids"])
        return jobs

    def add(self, event: Output) -> None:
        self._steps(event)

    def body(self) -> dict[str, Any]:
        return {
            **self._head(),
            "content": [_whole(block) for block in self._blocks.all],
            "stop_reason": self._stop_reason(),
            "stop_sequence": self._stop_sequence,
            "usage": self._usage(),
        }

    def opening(self) -> bytes:
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        return _event("message_start", message={**message, "usage": self._usage()})

    def chunks(self, event: Output) -> bytes:
        return b"".join(_step(*step) for step in self._steps(event))

    def closing(self) -> bytes:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence}
        return _event("message_delta", delta=delta, usage=self._usage()) + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return _event("error", **error.body())

    def prompt_text(self) -> str:
        return to_json(self._body.messages)

    def _steps(self, event: Output) -> list[tuple[Step, Block, str]]:
        steps: list[tuple[Step, Block, str]] = []
        for completion in event.output.outputs:
            steps += self._blocks.take(self._chat.pieces(completion))
            if completion.finish_reason is not None:
                steps += self._blocks.finish()
                if isinstance(completion.stop_reason, str):
                    self._stop_sequence = completion.stop_reason
        return steps

    def _stop_reason(self) -> str:
        if self._stop_sequence is not None:
            return "stop_sequence"
        return _STOP_REASONS.get(self._chat.finish_reason or "stop", "end_turn")

    def _head(self) -> dict[str, Any]:
        model = self._chat.model_name
        return {"id": self.record.request_id, "type": "message", "role": "assistant", "model": model}

    def _usage(self) -> dict[str, Any]:
        cached = self.record.num_cached_tokens
        return {
            "input_tokens": self._num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.record.generated_tokens,
        }


def to_chat(body: MessagesBody) -> ChatBody:
    """The same request as a chat completion's.

    Raises:
        ApiError: a block, tool or choice that has no such form.
    """
    messages: list[JsonObject] = []
    if body.system:
        messages.append({"role": "system", "content": _system(body.system)})
    for index, message in enumerate(body.messages):
        messages += _messages(message.role, message.content, f"messages[{index}].content")
    thinking = {} if body.thinking is None else {"enable_thinking": body.thinking.type == "enabled"}
    return ChatBody(
        model=body.model,
        messages=messages,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())] or None,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=not (body.tool_choice or {}).get("disable_parallel_tool_use", False),
        chat_template_kwargs=thinking or None,
    )


def _system(given: str | list[JsonObject]) -> str:
    if isinstance(given, str):
        return given
    return "\n".join(_text(block, f"system[{index}]") for index, block in enumerate(given))


def _messages(role: str, content: str | list[JsonObject], where: str) -> list[JsonObject]:
    """One message, and before it one for each tool result."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    results: list[JsonObject] = []
    texts, calls, thoughts = [], [], []
    for index, block in enumerate(content):
        place, kind = f"{where}[{index}]", block.get("type")
        if kind == "tool_result" and role == "user":
            results.append(_tool_result(block, place))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_tool_call(block, place))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(_text(block, place))
    message: JsonObject = {"role": role, "content": None if calls and not texts else "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [*results, message] if texts or calls or not results else results


def _text(block: JsonObject, where: str) -> str:
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        refuse(f"{where}: expected a text block, found {str(block.get('type'))[:40]!r}", where)
    return text


def _tool_result(block: JsonObject, where: str) -> JsonObject:
    content = block.get("content", "")
    if isinstance(content, list):
        content = _system(content)
    if not isinstance(content, str) or not isinstance(block.get("tool_use_id"), str):
        refuse(f"{where}: expected a tool_use_id and text", where)
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": content}


def _tool_call(block: JsonObject, where: str) -> JsonObject:
    name, arguments = block.get("name"), block.get("input", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        refuse(f"{where}: expected a name and an input object", where)
    function = {"name": name, "arguments": to_json(arguments)}
    return {"id": str(block.get("id", "")), "type": "function", "function": function}


def _tool(tool: JsonObject, where: str) -> JsonObject:
    if tool.get("type", "custom") != "custom":
        refuse(f"{where}.type: {str(tool['type'])[:40]!r} is not offered here", "tools")
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema", {})}
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(choice: JsonObject | None) -> str | JsonObject | None:
    if choice is None:
        return None
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in ("auto", "none", "any"):
        refuse("tool_choice.type: expected auto, any, tool or none", "tool_choice")
    return "required" if kind == "any" else str(kind)


def _event(name: str, **fields: Any) -> bytes:
    return sse.event({"type": name, **fields}, name)


def _step(step: Step, block: Block, text: str) -> bytes:
    if step == "start":
        return _event("content_block_start", index=block.index, content_block=_whole(block))
    if step == "stop":
        return _event("content_block_stop", index=block.index)
    delta = {
        "text": {"type": "text_delta", "text": text},
        "reasoning": {"type": "thinking_delta", "thinking": text},
        "tool_call": {"type": "input_json_delta", "partial_json": text},
    }[block.kind]
    return _event("content_block_delta", index=block.index, delta=delta)


def _whole(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": block.arguments()}
