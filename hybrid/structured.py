"""What structured output has to look like: a schema, expression, choice or grammar, checked when given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import dumps, loads
from typing import Any, Literal, NoReturn

from hybrid.errors import RequestError

Kind = Literal["json", "regex", "choice", "grammar", "json_object"]

MAX_SCHEMA_BYTES = 256 * 1024
MAX_SCHEMA_DEPTH = 64  # levels of objects and arrays
MAX_REGEX_BYTES = 16 * 1024
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 4096
MAX_CHOICE_BYTES = 64 * 1024  # all of them
MAX_MARKER_BYTES = 64


@dataclass(frozen=True)
class StructuredOutputs:
    """The form of a text. Exactly one of the first five is given.

    Attributes:
        json: a JSON Schema, an object or its text; kept as text. The text is a JSON value that it accepts.
        regex: an expression in the syntax of Rust's ``regex`` that the whole text matches; ``\\d`` is 0 to 9.
        choice: the text is one of these.
        grammar: a context-free grammar, in llguidance's variant of Lark or in GBNF.
        json_object: the text is a JSON object.
        after: the form holds for what follows this marker; before it the text is free, and does not end. For
            models that think first: ``"</think>"`` where the prompt has opened the block.

    Raises:
        RequestError: none or several are given, one is of a wrong type, or it is too large or too deep.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    after: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            _refuse("json_object", "True or False", self.json_object)
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            _refuse(None, "exactly one of json, regex, choice, grammar and json_object", given)
        if self.after is not None:
            _check_text("after", self.after, MAX_MARKER_BYTES)
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.regex is not None:
            _check_text("regex", self.regex, MAX_REGEX_BYTES)
        if self.grammar is not None:
            _check_text("grammar", self.grammar, MAX_GRAMMAR_BYTES)
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @property
    def kind(self) -> Kind:
        """The name of the one that is given."""
        if self.json is not None:
            return "json"
        if self.regex is not None:
            return "regex"
        if self.choice is not None:
            return "choice"
        return "grammar" if self.grammar is not None else "json_object"


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        _check_text("json", schema, MAX_SCHEMA_BYTES)
        text = schema
        try:
            schema = loads(text)
        except (ValueError, RecursionError) as error:
            _refuse("json", f"a JSON Schema; this is not JSON ({error})", text)
    else:
        _check_depth(schema)
        try:
            text = dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            _refuse("json", f"a JSON Schema that can be written as JSON ({error})", schema)
        _check_text("json", text, MAX_SCHEMA_BYTES)
    if not isinstance(schema, Mapping):
        _refuse("json", "a JSON Schema that is an object", schema)
    _check_depth(schema)
    return text


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
        if len(level) > MAX_SCHEMA_BYTES:  # shared parts of an object multiply when they are written
            _refuse("json", f"a schema of at most {MAX_SCHEMA_BYTES} bytes", schema)
    _refuse("json", f"a schema of at most {MAX_SCHEMA_DEPTH} levels", schema)


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        _refuse("choice", "a sequence of strings", choices)
    if not 1 <= len(choices) <= MAX_CHOICES:
        _refuse("choice", f"1 to {MAX_CHOICES} strings", len(choices))
    for text in choices:
        _check_text("choice", text, MAX_CHOICE_BYTES)
    if sum(len(text.encode()) for text in choices) > MAX_CHOICE_BYTES:
        _refuse("choice", f"at most {MAX_CHOICE_BYTES} bytes in all", choices)
    return tuple(choices)


def _check_text(field: str, text: Any, max_bytes: int) -> None:
    if not isinstance(text, str) or not text:
        _refuse(field, "a string that is not empty", text)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        _refuse(field, "valid Unicode without lone surrogates", text)
    if size > max_bytes:
        _refuse(field, f"at most {max_bytes} bytes", f"{size} bytes")


def _refuse(field: str | None, expected: str, found: object) -> NoReturn:
    where = "structured_outputs" if field is None else f"structured_outputs.{field}"
    raise RequestError("invalid structured output", field=where, expected=expected, found=found)
