"""From messages, tools and template options to the ids of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def checked_tools(
    tools: list[dict[str, Any]] | None, tool_choice: str | dict[str, Any] | None
) -> list[dict[str, Any]] | None:
    """The tools that the model is to be told of; ``None`` if none.

    Raises:
        ApiError: a tool is malformed, or the choice is one that cannot be enforced.
    """
    for index, tool in enumerate(tools or ()):
        _check_tool(tool, f"tools[{index}]")
    if tool_choice not in (None, "auto", "none"):
        if not tools:
            refuse("tool_choice: there are no tools", "tool_choice")
        refuse(
            "tool_choice: expected auto or none; a call cannot be forced by this build",
            "tool_choice",
            "unsupported",
        )
    return None if tool_choice == "none" or not tools else tools


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
