"""``POST /v1/responses``: OpenAI's other protocol, for one choice of a chat. Nothing is stored."""

from __future__ import annotations

from typing import Any

from hybrid.server import sse
from hybrid.server.blocks import Block, Blocks, Step
from hybrid.server.chat import ChatAnswer
from hybrid.server.context import ServerContext
from hybrid.server.errors import ApiError, refuse
from hybrid.server.generation import Job, Output
from hybrid.server.json_response import to_json
from hybrid.server.protocol import ChatBody, JsonObject, ResponseFormat, ResponsesBody
from hybrid.server.respond import Answer

_TEXT_PARTS = ("input_text", "output_text", "text")


class ResponsesAnswer(Answer):
    """Responses, streamed or whole; the work is a chat completion's."""

    def __init__(self, context: ServerContext, body: ResponsesBody) -> None:
        self._chat = ChatAnswer(context, to_chat(body), "resp_")
        self._body = body
        self.record, self.stream = self._chat.record, body.stream
        self._created = int(context.clock())
        self._blocks = Blocks()
        self._num_events = 0

    def jobs(self) -> list[Job]:
        return self._chat.jobs()

    def add(self, event: Output) -> None:
        self._steps(event)

    def body(self) -> dict[str, Any]:
        cut_off = self._chat.finish_reason == "length"
        return {
            **self._head("incomplete" if cut_off else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output": [self._item(block, "completed") for block in self._blocks.all],
            "usage": self._usage(),
        }

    def opening(self) -> bytes:
        begun = {**self._head("in_progress"), "incomplete_details": None, "output": [], "usage": None}
        return self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )

    def chunks(self, event: Output) -> bytes:
        return b"".join(self._step(*step) for step in self._steps(event))

    def closing(self) -> bytes:
        body = self.body()
        return self._event(f"response.{body['status']}", response=body)

    def failure(self, error: ApiError) -> bytes:
        fields = error.body()["error"]
        return self._event(
            "error", code=fields["code"] or fields["type"], message=fields["message"], param=None
        )

    def prompt_text(self) -> str:
        return to_json(self._body.input)

    def _steps(self, event: Output) -> list[tuple[Step, Block, str]]:
        steps: list[tuple[Step, Block, str]] = []
        for completion in event.output.outputs:
            steps += self._blocks.take(self._chat.pieces(completion))
            if completion.finish_reason is not None:
                steps += self._blocks.finish()
        return steps

    def _step(self, step: Step, block: Block, text: str) -> bytes:
        place = {"item_id": self._item_id(block), "output_index": block.index}
        if step == "delta":
            return self._event(f"{_prefix(block)}.delta", **place, **_part_index(block), delta=text)
        if step == "start":
            item = self._item(block, "in_progress")
            data = self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind == "tool_call":
                return data
            return data + self._event(
                "response.content_part.added", **place, content_index=0, part=_part(block)
            )
        done = {"arguments": block.text} if block.kind == "tool_call" else {"text": block.text}
        data = self._event(f"{_prefix(block)}.done", **place, **_part_index(block), **done)
        if block.kind != "tool_call":
            data += self._event("response.content_part.done", **place, content_index=0, part=_part(block))
        item = self._item(block, "completed")
        return data + self._event("response.output_item.done", output_index=block.index, item=item)

    def _event(self, name: str, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return sse.event({"type": name, "sequence_number": number, **fields}, name)

    def _item_id(self, block: Block) -> str:
        prefix = {"text": "msg", "reasoning": "rs", "tool_call": "fc"}[block.kind]
        return f"{prefix}_{self.record.request_id.removeprefix('resp_')}_{block.index}"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block)}
        parts = [] if status == "in_progress" else [_part(block)]
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": parts}
        if block.kind == "text":
            return {**item, "type": "message", "status": status, "role": "assistant", "content": parts}
        call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
        return {**item, "type": "function_call", "status": status, **call}

    def _head(self, status: str) -> dict[str, Any]:
        body = self._body
        return {
            "id": self.record.request_id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._chat.model_name,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"} if body.text is None else body.text.get("format")},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
            "truncation": "disabled",
        }

    def _usage(self) -> dict[str, Any]:
        record = self.record
        return {
            "input_tokens": record.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": record.num_cached_tokens},
            "output_tokens": record.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": record.num_prompt_tokens + record.generated_tokens,
        }


def to_chat(body: ResponsesBody) -> ChatBody:
    """The same request as a chat completion's.

    Raises:
        ApiError: it needs stored responses, or an item, tool or format that has no such form.
    """
    if body.previous_response_id is not None:
        refuse(
            "previous_response_id: responses are not stored; send the conversation", "previous_response_id"
        )
    if body.background:
        refuse("background: is not supported", "background", "unsupported")
    messages: list[JsonObject] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for index, item in enumerate(body.input):
            _add_item(messages, item, f"input[{index}]")
    if not messages:
        refuse("input: there is no message", "input")
    return ChatBody(
        model=body.model,
        messages=messages,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools or ())] or None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text),
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
    )


def _add_item(messages: list[JsonObject], item: JsonObject, where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        last = messages[-1] if messages else {}
        if "tool_calls" in last:
            last["tool_calls"].append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        output = _content(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind != "reasoning":
        refuse(f"{where}.type: {str(kind)[:40]!r} is not offered here", "input")


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(f"{where}.content: expected a string or a list of parts", "input")
    texts = []
    for part in content:
        if (
            not isinstance(part, dict)
            or part.get("type") not in _TEXT_PARTS
            or not isinstance(part.get("text"), str)
        ):
            refuse(f"{where}.content: expected parts of text", "input")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool(tool: JsonObject, where: str) -> JsonObject:
    if tool.get("type") != "function":
        refuse(f"{where}.type: {str(tool.get('type'))[:40]!r} is not offered here, only functions", "tools")
    function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _format(text: JsonObject | None) -> ResponseFormat | None:
    given = None if text is None else text.get("format")
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        refuse("text.format.type: expected text, json_object or json_schema", "text")
    return ResponseFormat(
        type=kind, json_schema={"schema": given.get("schema")} if kind == "json_schema" else None
    )


def _prefix(block: Block) -> str:
    return {
        "text": "response.output_text",
        "reasoning": "response.reasoning_text",
        "tool_call": "response.function_call_arguments",
    }[block.kind]


def _part_index(block: Block) -> dict[str, int]:
    return {} if block.kind == "tool_call" else {"content_index": 0}


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": []}
