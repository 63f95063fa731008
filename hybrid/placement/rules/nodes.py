"""YAML as values that know where they stand.

A strict part of YAML: one document, no anchors, aliases, tags or merge keys, no key twice. Plain scalars are
typed as YAML 1.2's core schema has it, so that ``off``, ``no`` and ``1:30`` are text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from hybrid.errors import PlacementError

Scalar = str | int | float | bool | None

MAX_BYTES = 256 << 10
_MAX_DEPTH = 16
_MAX_NODES = 50_000

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_OTHER_BASE = re.compile(r"0o[0-7]{1,18}|0x[0-9a-fA-F]{1,15}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")
_SPECIAL_FLOAT = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# What YAML allows a text to hold.
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Entry(NamedTuple):
    """A key's place and its value."""

    key_where: str
    node: Node


@dataclass(frozen=True)
class Node:
    """A value and its place: ``file:line:column``, or the path to it in a dict."""

    where: str
    value: Scalar | tuple[Node, ...] | dict[str, Entry]

    def describe(self) -> str:
        """What was found, for a message."""
        if isinstance(self.value, dict):
            return "a mapping" if self.value else "an empty mapping"
        if isinstance(self.value, tuple):
            return "a list" if self.value else "an empty list"
        if self.value is None:
            return "nothing"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return repr(self.value) if isinstance(self.value, str) else f"the number {self.value}"


def fail(where: str, problem: str) -> NoReturn:
    """Raise `PlacementError` about a place."""
    raise PlacementError(f"{where}: {problem}") from None


def read_yaml(data: bytes, source: str) -> Node:
    """The one document of a file.

    Raises:
        PlacementError: with line and column, as far as there are any.
    """
    if len(data) > MAX_BYTES:
        fail(source, f"larger than {MAX_BYTES >> 10} KiB, which no rule file is; is this another file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(source, f"not text: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8")
    bad = _NOT_PRINTABLE.search(text)
    if bad:
        before = text[: bad.start()]
        column = bad.start() - before.rfind("\n")
        fail(
            f"{source}:{before.count(chr(10)) + 1}:{column}",
            f"not text: the character U+{ord(bad[0]):04X} is not allowed in YAML",
        )
    return _Reader(text, source).document()


class _Reader:
    """From events to nodes. Events come one by one, so that what is too deep or too much ends at once."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._loader: Any = yaml.BaseLoader(text)

    def document(self) -> Node:
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            fail(self.source, "an empty file; a rule file begins with version: 1")
        first = self._next()
        if isinstance(first, yaml.ScalarEvent) and first.style is None and first.value in _NULLS:
            fail(self.source, "an empty file; a rule file begins with version: 1")
        root = self._node(first, 0)
        self._next()  # the document's end
        following = self._next()
        if not isinstance(following, yaml.StreamEndEvent):
            fail(self._where(following), "a second document; a rule file has one, so remove the line ---")
        return root

    def _next(self) -> Any:
        try:
            return self._loader.get_event()
        except yaml.MarkedYAMLError as error:
            where = self._at(error.problem_mark or error.context_mark)
            fail(where, f"not YAML: {error.problem}" + (f" ({error.context})" if error.context else ""))
        except (yaml.YAMLError, ValueError, OverflowError):
            # Numbers in escapes and directives that are out of range.
            fail(self._at(self._loader.get_mark()), "not YAML: a number here is out of range")

    def _where(self, event: Any) -> str:
        return self._at(event.start_mark)

    def _at(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}:{mark.column + 1}"

    def _node(self, event: Any, depth: int) -> Node:
        where = self._where(event)
        if isinstance(event, yaml.AliasEvent):
            fail(where, f"the alias *{event.anchor} is not allowed; write the value out")
        if event.anchor is not None:
            fail(where, f"the anchor &{event.anchor} is not allowed, since aliases are not")
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            fail(where, f"the tag {tag} is not allowed; values need none")
        if depth >= _MAX_DEPTH:
            fail(where, f"nested deeper than {_MAX_DEPTH} levels")
        if isinstance(event, yaml.ScalarEvent):
            return Node(where, event.value if event.style else typed(event.value))
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := self._next(), yaml.SequenceEndEvent):
                items.append(self._node(item, depth + 1))
            return Node(where, tuple(items))
        return Node(where, self._entries(depth))

    def _entries(self, depth: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key_where = self._where(event)
            if not isinstance(event, yaml.ScalarEvent):
                self._node(event, depth + 1)
                fail(key_where, "a key must be text, found a list or a mapping")
            self._node(event, depth + 1)
            key = str(event.value)
            if key == "<<" and not event.style:
                fail(key_where, "the merge key << is not allowed; write the keys out")
            if key in entries:
                fail(key_where, f"duplicate key {key!r}, which stands at {entries[key].key_where} already")
            entries[key] = Entry(key_where, self._node(self._next(), depth + 1))
        return entries


def typed(text: str) -> Scalar:
    """What a plain scalar is in YAML 1.2."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    special = _SPECIAL_FLOAT.fullmatch(text)
    return float((special[1] or "") + (special[2] or "nan")) if special else text


def from_python(value: Any) -> Node:
    """Nodes of a dict of lists, dicts and scalars; their places are paths such as ``<rules>.rules[0]``.

    Raises:
        PlacementError: a value of another type, too much or too deep.
    """
    return _Walk().node(value, "<rules>", 0)


class _Walk:
    def __init__(self) -> None:
        self._num_nodes = 0

    def node(self, value: Any, where: str, depth: int) -> Node:
        self._num_nodes += 1
        if depth >= _MAX_DEPTH or self._num_nodes > _MAX_NODES:
            fail(where, f"nested deeper than {_MAX_DEPTH} levels or more than {_MAX_NODES} values")
        if isinstance(value, list | tuple):
            return Node(where, tuple(self.node(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)))
        if isinstance(value, dict):
            return Node(where, {key: self._entry(key, v, where, depth) for key, v in value.items()})
        if isinstance(value, Path):
            return Node(where, str(value))
        if value is None or isinstance(value, str | int | float | bool):
            return Node(where, value)
        fail(where, f"expected text, numbers, lists and dicts, found {type(value).__name__}")

    def _entry(self, key: Any, value: Any, where: str, depth: int) -> Entry:
        if not isinstance(key, str):
            fail(where, f"a key must be text, found {key!r}")
        path = f"{where}.{key}"
        return Entry(path, self.node(value, path, depth + 1))
