"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from hybrid.outputs import CompletionOutput
from hybrid.server import sse
from hybrid.server.chat_prompt import checked_options, checked_tools, encode_chat
from hybrid.server.context import ServerContext
from hybrid.server.errors import refuse
from hybrid.server.generation import Job, Output, Progress
from hybrid.server.json_response import to_json
from hybrid.server.logprobs import chat_logprobs
from hybrid.server.parsers import OutputParser, ParsedDelta, ToolCallDelta, opens_thinking, parser_for
from hybrid.server.parsers.format import THINK_END
from hybrid.server.parsers.table import format_of
from hybrid.server.protocol import MAX_TOP_LOGPROBS, ChatBody
from hybrid.server.record import Record
from hybrid.server.respond import Answer
from hybrid.server.sampling import num_choices, sampling_params
from hybrid.server.tool_grammar import tool_grammar

_PROMPT_END_TOKENS = 16  # enough to see whether the template has opened a reasoning block


class ChatAnswer(Answer):
    """Chat completions, streamed or whole."""

    def __init__(self, context: ServerContext, body: ChatBody, id_prefix: str = "chatcmpl-") -> None:
        self._engine, self._card = context.check_ready()
        self._body = body
        self._created = int(context.clock())
        self.record = Record(context.new_id(id_prefix))
        self.stream, self.wants_progress = body.stream, body.return_progress
        self._top_logprobs = _top_logprobs(body)
        self._tools = checked_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
        self._options = checked_options(body.chat_template_kwargs, body.reasoning_effort)
        if body.chat_template is not None:
            refuse("chat_template: requests cannot bring a template of their own", "chat_template")
        self._n = num_choices(body)
        self._choices: list[ChatChoice] = []  # made when the prompt is: what it ends with is theirs to know

    @property
    def model_name(self) -> str:
        return self._card.name

    @property
    def finish_reason(self) -> str | None:
        """Of the first choice, once it is over."""
        return self._choices[0].finish_reason

    def pieces(self, completion: CompletionOutput) -> list[ParsedDelta]:
        """What an output adds to its choice, parsed."""
        return self._choices[completion.index].take(completion)

    def jobs(self) -> list[Job]:
        body = self._body
        ids = encode_chat(
            self._engine, body.messages, tools=self._tools.offered, options=self._options,
            add_generation_prompt=body.add_generation_prompt,
        )  # fmt: skip
        thinks = opens_thinking(self._engine.tokenizer.decode(ids[-_PROMPT_END_TOKENS:]))
        self._choices = [ChatChoice(index, self._parser(thinks)) for index in range(self._n)]
        params = sampling_params(
            body,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=self._top_logprobs,
            response_format=body.response_format,
            tool_grammar=self._tool_grammar(),
            after=THINK_END if thinks else None,
            keep_special_tokens=self._choices[0].has_parser,
        )
        return [Job({"prompt_token_ids": ids}, params, self.record.request_id)]

    def add(self, event: Output) -> None:
        for completion in event.output.outputs:
            self.pieces(completion)
            self._choices[completion.index].logprobs += self._logprobs(completion) or ()

    def body(self) -> dict[str, Any]:
        wants_logprobs = self._top_logprobs is not None
        return {
            "id": self.record.request_id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._card.name,
            "choices": [choice.json(wants_logprobs) for choice in self._choices],
            "usage": self.record.usage(),
            "timings": self.record.timings(),
        }

    def opening(self) -> bytes:
        return b"".join(
            self._chunk(choice.index, {"role": "assistant", "content": ""}) for choice in self._choices
        )

    def chunks(self, event: Output) -> bytes:
        return b"".join(self._chunks(each, event.output.finished) for each in event.output.outputs)

    def progress(self, event: Progress) -> bytes:
        progress = {"total": event.total, "processed": event.computed}
        return sse.event(self._envelope([], {"prompt_progress": progress}))

    def closing(self) -> bytes:
        if not self._body.include_usage:
            return sse.DONE
        return sse.event(self._envelope([], {"usage": self.record.usage()})) + sse.DONE

    def prompt_text(self) -> str:
        return to_json(self._body.messages)

    def _tool_grammar(self) -> str | None:
        """The grammar that forces a call or keeps to one; ``None`` where nothing is asked.

        Raises:
            ApiError: the model has no format of calls, or a response format is asked for too.
        """
        if not self._tools.needs_grammar:
            return None
        param = "tool_choice" if self._tools.forced else "parallel_tool_calls"
        row = format_of(self._card.chat_template_text, self._card.architecture)
        if row is None:
            refuse(f"{param}: how this model writes tool calls is not known", param, "unsupported")
        tools = self._tools.forced or self._tools.offered or ()
        return tool_grammar(
            row.name, tools, self._engine.tokenizer,
            required=bool(self._tools.forced), several=self._tools.several,
        )  # fmt: skip

    def _parser(self, thinks: bool) -> OutputParser | None:
        return parser_for(
            self._card.chat_template_text,
            self._card.architecture,
            tools=self._tools.offered is not None,
            thinking_open=thinks,
            tool_definitions=self._tools.offered or (),
        )

    def _chunks(self, completion: CompletionOutput, is_last: bool) -> bytes:
        choice = self._choices[completion.index]
        deltas: list[dict[str, Any]] = [_delta(piece) for piece in self.pieces(completion)]
        logprobs = self._logprobs(completion)
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        data = b""
        for delta in deltas:
            data += self._chunk(completion.index, delta, logprobs=logprobs)
            logprobs = None
        if completion.finish_reason is not None:
            extra = {"timings": self.record.timings()} if is_last else {}
            data += self._chunk(completion.index, {}, choice.finish_reason, extra=extra)
        return data

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        *,
        logprobs: list[dict[str, Any]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs} if logprobs else None,
            "finish_reason": finish_reason,
        }
        return sse.event(self._envelope([choice], extra or {}))

    def _envelope(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._body.include_usage else {}
        return {
            "id": self.record.request_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._card.name,
            "choices": choices,
            **usage,
            **extra,
        }

    def _logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]] | None:
        if self._top_logprobs is None or completion.logprobs is None:
            return None
        return chat_logprobs(completion, self._engine.tokenizer, self._top_logprobs)


class ChatChoice:
    """One choice: its parser, and what it has said."""

    def __init__(self, index: int, parser: OutputParser | None) -> None:
        self.index, self._parser = index, parser
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    @property
    def has_parser(self) -> bool:
        return self._parser is not None

    def take(self, completion: CompletionOutput) -> list[ParsedDelta]:
        """What the new text says."""
        pieces = self._parse(completion)
        for piece in pieces:
            if piece.content is not None:
                self.content.append(piece.content)
            if piece.reasoning is not None:
                self.reasoning.append(piece.reasoning)
            if piece.tool_call is not None:
                self._add_call(piece.tool_call)
        if completion.finish_reason is not None:
            calls = completion.finish_reason == "stop" and self.tool_calls
            self.finish_reason = "tool_calls" if calls else completion.finish_reason
        return pieces

    def json(self, wants_logprobs: bool) -> dict[str, Any]:
        """The choice as a whole answer has it."""
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.tool_calls:
            message["content"] = content or None
            message["tool_calls"] = self.tool_calls
        return {
            "index": self.index,
            "message": message,
            "logprobs": {"content": self.logprobs} if wants_logprobs else None,
            "finish_reason": self.finish_reason,
        }

    def _parse(self, completion: CompletionOutput) -> list[ParsedDelta]:
        if self._parser is None:
            return [ParsedDelta(content=completion.text)] if completion.text else []
        pieces = self._parser.feed(completion.text) if completion.text else []
        return pieces + self._parser.finish() if completion.finish_reason is not None else pieces

    def _add_call(self, delta: ToolCallDelta) -> None:
        while len(self.tool_calls) <= delta.index:
            self.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call = self.tool_calls[delta.index]
        call["id"] = delta.id or call["id"]
        call["function"]["name"] = delta.name or call["function"]["name"]
        call["function"]["arguments"] += delta.arguments_delta


def _delta(piece: ParsedDelta) -> dict[str, Any]:
    """A piece as a stream has it."""
    if piece.reasoning is not None:
        return {"reasoning_content": piece.reasoning}
    if piece.tool_call is None:
        return {"content": piece.content}
    call = piece.tool_call
    function: dict[str, Any] = {} if call.name is None else {"name": call.name}
    function["arguments"] = call.arguments_delta
    begun = {} if call.id is None else {"id": call.id, "type": "function"}
    return {"tool_calls": [{"index": call.index, **begun, "function": function}]}


def _top_logprobs(body: ChatBody) -> int | None:
    """How many of the best tokens are shown; ``None``: no log-probabilities."""
    if body.top_logprobs is not None:
        if not body.logprobs:
            refuse("top_logprobs: needs logprobs: true", "top_logprobs")
        if not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
            refuse(
                f"top_logprobs: expected 0 to {MAX_TOP_LOGPROBS}, found {body.top_logprobs}", "top_logprobs"
            )
    return (body.top_logprobs or 0) if body.logprobs else None
