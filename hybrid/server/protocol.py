"""Bodies of requests. Unknown fields are ignored; values of known ones must have the right JSON type.

Ranges are checked where they mean something: in `SamplingParams`, in the chat template and in the engine.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 16  # n
MAX_PROMPTS = 64  # of one completion request
MAX_TOP_LOGPROBS = 20

JsonObject = dict[str, Any]


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="ignore", strict=True)


class StreamOptions(Body):
    include_usage: bool = False


class GenerationBody(Body):
    """What chat and text completions have in common."""

    model: str | None = Field(default=None, description="a name that /v1/models lists; none means that one")
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: JsonObject | None = Field(
        default=None, description="one of json (a schema), regex, choice, grammar, json_object"
    )
    return_progress: bool = Field(
        default=False, description="a stream tells how much of the prompt is computed"
    )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonObject | None = None


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    messages: list[JsonObject] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None
    add_generation_prompt: bool = True


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    return_token_ids: bool = Field(
        default=False, description="choices have token_ids; streams send every token, text or not"
    )
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | list[JsonObject]


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]


class MessagesBody(Body):
    """``POST /v1/messages``."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    max_tokens: int
    system: str | list[JsonObject] | None = None
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[JsonObject] | None = None
    tool_choice: JsonObject | None = None
    thinking: Thinking | None = None


class CountTokensBody(MessagesBody):
    """``POST /v1/messages/count_tokens``."""

    max_tokens: int = 1


class Reasoning(Body):
    effort: str | None = None


class ResponsesBody(Body):
    """``POST /v1/responses``."""

    model: str | None = None
    input: str | list[JsonObject] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    text: JsonObject | None = None
    tools: list[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    background: bool | None = None


class TokenizeBody(Body):
    """``POST /tokenize``: a text as ``prompt`` or ``content``, or ``messages``."""

    prompt: str | None = None
    content: str | None = None
    messages: list[JsonObject] | None = None
    tools: list[JsonObject] | None = None
    chat_template_kwargs: JsonObject | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = True
    add_special: bool | None = Field(default=None, description="llama.cpp's name of add_special_tokens")
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    tokens: list[int]
