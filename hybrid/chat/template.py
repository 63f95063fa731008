"""Conversations to prompts, by the chat template of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

from hybrid.chat.marking import Marker
from hybrid.chat.messages import checked_json, checked_messages, checked_tools
from hybrid.chat.meter import LimitExceeded, Limits, metered
from hybrid.chat.sandbox import Sandbox, TemplateRefusal
from hybrid.errors import RequestError, TokenizerError
from hybrid.log import get_logger
from hybrid.tokenizer import Tokenizer

logger = get_logger(__name__)

KEY = "tokenizer.chat_template"
DEFAULT, TOOL_USE = "default", "tool_use"
_COMPILE_LIMITS = Limits(seconds=10.0)
_OWN_NAMES = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "template"})


@dataclass(frozen=True)
class _Loaded:
    template: jinja2.Template
    marker: Marker


class ChatTemplate:
    """The chat templates of a model: the default one and named variants.

    A template that does not compile does not keep a model from loading: `problem` says what is
    wrong, and rendering raises it.

    Attributes:
        names: the templates of the file, broken ones included.
        problem: why the default template cannot be used, or ``None``.
    """

    def __init__(
        self, sources: Mapping[str, Any], tokenizer: Tokenizer, *, limits: Limits | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits or Limits()
        self._sandbox = Sandbox(_tojson)
        self._loaded: dict[str, _Loaded | str] = {
            name: self._load(name, source) for name, source in sources.items()
        }
        self.names = tuple(self._loaded)
        found = self._loaded.get(DEFAULT, f"the file has no {KEY}")
        self.problem = found if isinstance(found, str) else None

    @classmethod
    def from_gguf(cls, source: Any, tokenizer: Tokenizer, *, limits: Limits | None = None) -> ChatTemplate:
        """The templates in ``source``: an open GGUF file, or its metadata as a mapping. Never raises for
        a missing or broken template."""
        metadata: Mapping[str, Any] = getattr(source, "metadata", source)
        sources = {DEFAULT: metadata[KEY]} if KEY in metadata else {}
        for key, value in metadata.items():
            if key.startswith(f"{KEY}."):
                sources[key.removeprefix(f"{KEY}.")] = value
        return cls(sources, tokenizer, limits=limits)

    def render(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        tools: Any = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt as text, for people. Encode conversations with `encode`: in this text nothing
        tells a control token of the template from one spelled out in a message.

        Args:
            messages: dicts with ``role`` and ``content`` (a string or text parts), see ``messages.py``.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON descriptions of functions.
            template: a named variant; by default ``tool_use`` where there are tools and such a variant.
            kwargs: further JSON values for the template, such as ``enable_thinking``.

        Raises:
            RequestError: the messages are malformed, or the template refuses them.
            TokenizerError: the template is missing, broken, or exceeds its time or size limits.
        """
        loaded = self._pick(template, tools)
        return self._run(loaded, _values(messages, tools, kwargs, self._sandbox), add_generation_prompt)

    def encode(
        self,
        messages: Any,
        *,
        add_generation_prompt: bool = True,
        tools: Any = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Ids of the prompt; arguments and errors as in `render`.

        Control tokens come from the template alone: one spelled out in a message, a tool or another
        argument is encoded as the plain text it is. A bos token is put first where the vocabulary asks
        for one and the template does not write it.
        """
        loaded = self._pick(template, tools)
        values = _values(messages, tools, kwargs, self._sandbox)
        marker = loaded.marker
        marks = marker.choose(values)
        roles = [message["role"] for message in values["messages"]]
        values = marker.mark(values, marks)
        for message, role in zip(values["messages"], roles, strict=True):
            message["role"] = role
        rendered = self._run(loaded, values, add_generation_prompt)
        tokenizer = self._tokenizer
        ids = tokenizer.encode_pieces(marker.pieces(rendered, marks))
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def _pick(self, name: str | None, tools: Any) -> _Loaded:
        if name is not None and name not in self._loaded:
            raise RequestError(
                f"template {name!r} is not in this file, which has: {', '.join(self.names) or 'none'}"
            )
        if name is None:
            name = TOOL_USE if tools and TOOL_USE in self._loaded else DEFAULT
        loaded = self._loaded.get(name, f"the file has no {KEY}")
        if isinstance(loaded, str):
            raise TokenizerError(f"no chat with this model: {loaded}")
        return loaded

    def _load(self, name: str, source: Any) -> _Loaded | str:
        key = KEY if name == DEFAULT else f"{KEY}.{name}"
        if not isinstance(source, str):
            return f"{key} is not a string but {type(source).__name__}"
        try:
            with metered(_COMPILE_LIMITS, lines=False):
                template, known = self._sandbox.load(source)
            return _Loaded(template, Marker(self._tokenizer, known, source))
        except jinja2.TemplateSyntaxError as error:
            problem = f"line {error.lineno}: {error.message}"
        except (Exception, LimitExceeded) as error:
            problem = str(error) or type(error).__name__
        logger.warning("%s cannot be used: %s", key, problem)
        return f"{key} cannot be used: {problem}"

    def _run(self, loaded: _Loaded, values: dict[str, Any], add_generation_prompt: bool) -> str:
        tokenizer = self._tokenizer
        special = {
            name: "" if token_id is None else tokenizer.token_text(token_id)
            for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }
        limits = self._limits.grown_by(_chars(values))
        try:
            with metered(limits):
                text = loaded.template.render(
                    **special, **values, add_generation_prompt=bool(add_generation_prompt)
                )
        except TemplateRefusal as error:
            raise RequestError(f"the chat template refuses these messages: {error}") from None
        except LimitExceeded as error:
            raise TokenizerError(f"the chat template was stopped: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            raise TokenizerError(f"the chat template failed: {reason}") from None
        return text


def _values(messages: Any, tools: Any, kwargs: dict[str, Any], sandbox: Sandbox) -> dict[str, Any]:
    for name in kwargs:
        if name in _OWN_NAMES or name in sandbox.globals:
            raise RequestError(f"template argument {name!r} is set by the runtime and cannot be passed")
    values: dict[str, Any] = checked_json(kwargs, "template arguments")
    return {**values, "messages": checked_messages(messages), "tools": checked_tools(tools)}


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _chars(item) for key, item in value.items())
    return sum(map(_chars, value)) if isinstance(value, list) else 1


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter as chat templates expect it: without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
