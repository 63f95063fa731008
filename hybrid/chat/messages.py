"""Checking what a caller passes to a chat template: JSON values of the shapes templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MAX_DEPTH = 64


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of ``messages`` with content as one string (text parts joined by line breaks) or ``None``.

    Raises:
        RequestError: not a non-empty list of messages, unknown role, missing content, content that is
            not text, malformed tool calls, a value JSON cannot hold, a lone surrogate.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages: expected a non-empty list, found {_shown(messages)}")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Any) -> list[Any] | None:
    """A copy of ``tools``: a list of JSON objects.

    Raises:
        RequestError: it is something else.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError(f"tools: expected a list of objects, found {_shown(tools)}")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{index}]: expected an object, found {_shown(tool)}")
    copy: list[Any] = checked_json(tools, "tools")
    return copy


def checked_json(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a JSON value.

    Raises:
        RequestError: naming the place that is not JSON, is nested too deeply, or holds a lone surrogate.
    """
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, str):
        return _checked_text(value, where)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            _checked_text(key, f"{where} key"): checked_json(item, f"{where}.{key}", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [checked_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise RequestError(f"{where}: expected a JSON value, found {_shown(value)}")


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where}: expected an object with role and content, found {_shown(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role: expected one of {', '.join(ROLES)}, found {_shown(role)}")
    rest = {key: value for key, value in message.items() if key != "content"}
    checked: dict[str, Any] = checked_json(rest, where)
    if checked.get("tool_calls") is None:
        checked.pop("tool_calls", None)
    else:
        _check_tool_calls(checked["tool_calls"], role, where)
    if role == "tool" and not isinstance(checked.get("tool_call_id"), str):
        raise RequestError(f"{where}: a tool message needs the tool_call_id it answers")
    checked["content"] = _content(message, where, optional="tool_calls" in checked)
    return checked


def _content(message: Mapping[str, Any], where: str, *, optional: bool) -> str | None:
    content = message.get("content")
    if content is None:
        if optional:
            return None
        raise RequestError(f"{where}: content is missing")
    if isinstance(content, str):
        return _checked_text(content, f"{where}.content")
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise RequestError(f"{where}.content: expected a string or a list of parts, found {_shown(content)}")
    texts = []
    for index, part in enumerate(content):
        place = f"{where}.content[{index}]"
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise RequestError(f'{place}: expected {{"type": "text", "text": "..."}}, found {_shown(part)}')
        texts.append(_checked_text(part["text"], place))
    return "\n".join(texts)


def _check_tool_calls(calls: Any, role: str, where: str) -> None:
    if role != "assistant":
        raise RequestError(f"{where}: only an assistant message has tool_calls, this is a {role} message")
    if not isinstance(calls, list) or not calls:
        raise RequestError(f"{where}.tool_calls: expected a non-empty list, found {_shown(calls)}")
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{place}.function: expected an object with a name, found {_shown(function)}")
        if not isinstance(function.get("arguments", {}), str | dict):
            raise RequestError(
                f"{place}.function.arguments: expected an object or a JSON string, "
                f"found {_shown(function['arguments'])}"
            )


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{where}: expected a string, found {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: lone surrogate at character {error.start}: not valid Unicode") from None
    return str(text)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {ascii(value)[:60]}"
