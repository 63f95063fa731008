"""Which format a model writes: one table, by the markers in its chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.server.parsers import deepseek_v3, deepseek_v31, glm45, hermes, kimi_k2
from hybrid.server.parsers.format import THINK_BEGIN, THINK_END, ToolFormat
from hybrid.server.parsers.output_parser import OutputParser, new_call_id

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A format, the texts a template must hold and those it must not."""

    name: str
    format: Callable[[Tools], ToolFormat]
    markers: tuple[str, ...]
    without: tuple[str, ...] = ()

    def fits(self, template: str) -> bool:
        return all(text in template for text in self.markers) and not any(
            text in template for text in self.without
        )


# The first that fits. Qwen3-Coder's <function=...> inside <tool_call> is a format of its own, and not here.
FORMATS = (
    Row("kimi_k2", lambda tools: kimi_k2.FORMAT, (kimi_k2.CALL_BEGIN,)),
    Row("deepseek_v3", lambda tools: deepseek_v3.FORMAT, (deepseek_v3.CALL_BEGIN, "```json")),
    Row("deepseek_v31", lambda tools: deepseek_v31.FORMAT, (deepseek_v3.CALL_BEGIN,)),
    Row("glm45", glm45.glm_format, (glm45.CALL_BEGIN, "<arg_key>")),
    Row("hermes", lambda tools: hermes.FORMAT, (hermes.CALL_BEGIN,), ("<function=",)),
)

# For files without a template, where the architecture leaves no doubt.
BY_ARCHITECTURE = {"glm4moe": "glm45", "qwen3": "hermes", "qwen3moe": "hermes"}


def format_of(chat_template: str | None, architecture: str) -> Row | None:
    """The row for a model; ``None`` where no tool format is known."""
    if chat_template is None:
        name = BY_ARCHITECTURE.get(architecture)
        return next((row for row in FORMATS if row.name == name), None)
    return next((row for row in FORMATS if row.fits(chat_template)), None)


def parser_for(
    chat_template: str | None,
    architecture: str,
    *,
    tools: bool,
    thinking_open: bool = False,
    tool_definitions: Tools = (),
    call_id: Callable[[], str] = new_call_id,
) -> OutputParser | None:
    """A parser for one answer of a model; ``None`` where its text is all content.

    The text must hold the markers: some vocabularies count them among the special tokens, which decoding
    leaves out unless told otherwise (``SamplingParams.skip_special_tokens=False``).

    Args:
        chat_template: the source of the model's template.
        architecture: of the model's file.
        tools: the request offers tools, so calls are looked for.
        thinking_open: the rendered prompt ends inside a reasoning block: `opens_thinking`.
        tool_definitions: the request's tools; they tell strings from numbers where the format does not.
        call_id: makes the id of a call whose format has none.
    """
    row = format_of(chat_template, architecture) if tools else None
    reasoning = chat_template is not None and THINK_END in chat_template
    if row is None and not reasoning and not thinking_open:
        return None
    tool_format = None if row is None else row.format(tool_definitions)
    return OutputParser(tool_format, reasoning=reasoning, thinking_open=thinking_open, call_id=call_id)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a reasoning block: R1's always, V3.1's when asked to think."""
    return prompt.rstrip().endswith(THINK_BEGIN)
