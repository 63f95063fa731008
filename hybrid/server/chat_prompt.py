"""From messages, tools and template options to the ids of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.server.engine_api import AsyncEngine
from hybrid.server.errors import refuse

# What a request may tell the template. Everything else is the runtime's to say.
TEMPLATE_OPTIONS = frozenset(
    {
        "enable_thinking",
        "thinking",
        "thinking_budget",
        "reasoning_effort",
        "preserve_thinking",
        "clear_thinking",
    }
)
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request, and what their calls must be.

    Attributes:
        offered: what the model is told of; ``None`` if nothing.
        forced: the tools of which one must be called; empty: none must.
        several: whether calls may follow one another.
    """

    offered: list[dict[str, Any]] | None
    forced: list[dict[str, Any]]
    several: bool = True

    @property
    def needs_grammar(self) -> bool:
        return bool(self.forced) or (self.offered is not None and not self.several)


def checked_tools(
    tools: list[dict[str, Any]] | None,
    tool_choice: str | dict[str, Any] | None,
    parallel: bool | None = None,
) -> ToolUse:
    """What a request says of tools.

    Raises:
        ApiError: a tool is malformed, or the choice is none of theirs.
    """
    for index, tool in enumerate(tools or ()):
        _check_tool(tool, f"tools[{index}]")
    if tool_choice in (None, "auto", "none"):
        return ToolUse(None if tool_choice == "none" or not tools else tools, [], parallel is not False)
    if not tools:
        refuse("tool_choice: there are no tools", "tool_choice")
    if tool_choice == "required":
        return ToolUse(tools, tools, parallel is not False)
    name = _chosen_name(tool_choice)
    forced = [tool for tool in tools if tool["function"]["name"] == name]
    if name is None or not forced:
        names = ", ".join(tool["function"]["name"] for tool in tools[:8])
        expected = f'expected "auto", "none", "required" or one of the tools ({names})'
        refuse(f"tool_choice: {expected}, found {str(tool_choice)[:80]}", "tool_choice")
    return ToolUse(tools, forced[:1], several=False)


def _chosen_name(choice: str | dict[str, Any] | None) -> str | None:
    """The name in ``{"type": "function", "function": {"name": NAME}}``; Responses have it one level up."""
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_tool(tool: Mapping[str, Any], where: str) -> None:
    if tool.get("type") != "function":
        refuse(f'{where}.type: expected "function", found {str(tool.get("type"))[:40]!r}', "tools")
    function = tool.get("function")
    if not isinstance(function, dict):
        refuse(f"{where}.function: expected an object with a name", "tools")
    name = function.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        refuse(f"{where}.function.name: expected 1 to 64 letters, digits, _ . or -", "tools")
    if not isinstance(function.get("parameters", {}), dict):
        refuse(f"{where}.function.parameters: expected a JSON schema", "tools")


def checked_options(kwargs: Mapping[str, Any] | None, reasoning_effort: str | None) -> dict[str, Any]:
    """What the template is given besides messages and tools.

    Raises:
        ApiError: an option is not on the list, or not a plain value.
    """
    options = dict(kwargs or {})
    for name, value in options.items():
        if name not in TEMPLATE_OPTIONS:
            allowed = ", ".join(sorted(TEMPLATE_OPTIONS))
            refuse(
                f"chat_template_kwargs: {name[:60]!r} is not allowed, only {allowed}", "chat_template_kwargs"
            )
        if not isinstance(value, bool | int | float | str | None):
            refuse(f"chat_template_kwargs.{name}: expected a plain value", "chat_template_kwargs")
    if reasoning_effort is not None:
        options.setdefault("reasoning_effort", reasoning_effort)
    return options


def encode_chat(
    engine: AsyncEngine,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None,
    options: Mapping[str, Any],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Ids of the conversation. User text never becomes a control token. Runs in a thread.

    Raises:
        RequestError, TokenizerError: the messages, or the template, do not allow it.
    """
    return engine.chat_template.encode(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, **options
    )
