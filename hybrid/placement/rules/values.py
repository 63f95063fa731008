"""Reading nodes as values of one type each; what is not of it is refused, with its place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from hybrid import env
from hybrid.placement.rules.nodes import Node, fail

MAX_TEXT = 1000

_DEVICE = re.compile(r"cpu|(cuda|fake|fakegpu):[0-9]{1,2}")
_NEARLY_CUDA = re.compile(r"(?:cuda|gpu)[:_ ]?([0-9]{0,2})", re.IGNORECASE)
_SIZE = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})? ?([KMGT]iB|[KMGT]|[kMGT]B|B)")


def mapping(node: Node, what: str, known: Collection[str], required: Collection[str] = ()) -> dict[str, Node]:
    """A mapping that has no other keys than ``known``."""
    if not isinstance(node.value, dict):
        fail(node.where, f"{what}: expected a mapping, found {node.describe()}")
    for key, (key_where, _) in node.value.items():
        if key not in known:
            fail(key_where, f"unknown key {key!r} in {what}: expected {listed(known)}{nearest(key, known)}")
    for key in required:
        if key not in node.value:
            fail(node.where, f"{what} lacks {key!r}")
    return {key: entry.node for key, entry in node.value.items()}


def items(node: Node | None, what: str) -> tuple[Node, ...]:
    """The entries of a list; none where there is no node."""
    if node is None:
        return ()
    if not isinstance(node.value, tuple):
        fail(node.where, f"{what}: expected a list, found {node.describe()}")
    return node.value


def text(node: Node, what: str) -> str:
    """Text that is not empty and not too long."""
    if not isinstance(node.value, str):
        quote = "; quote it" if isinstance(node.value, int | float) else ""
        fail(node.where, f"{what}: expected text, found {node.describe()}{quote}")
    if not node.value or len(node.value) > MAX_TEXT:
        fail(node.where, f"{what}: expected 1 to {MAX_TEXT} characters, found {len(node.value)}")
    return node.value


def texts(node: Node, what: str) -> list[str]:
    """One text or a list of them."""
    if not isinstance(node.value, tuple):
        return [text(node, what)]
    if not node.value:
        fail(node.where, f"{what}: expected at least one, found an empty list")
    return [text(item, what) for item in node.value]


def one_of(node: Node, what: str, known: Collection[str]) -> str:
    """One of these words."""
    word = text(node, what)
    if word not in known:
        fail(node.where, f"{what}: expected {listed(known)}, found {word!r}{nearest(word, known)}")
    return word


def integer(node: Node, what: str, low: int, high: int) -> int:
    """A whole number in a range."""
    value = node.value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(node.where, f"{what}: expected a whole number from {low} to {high}, found {node.describe()}")
    return value


def boolean(node: Node, what: str) -> bool:
    """``true`` or ``false``, and nothing else that looks like it."""
    if not isinstance(node.value, bool):
        fail(node.where, f"{what}: expected true or false, found {node.describe()}")
    return node.value


def size(node: Node, what: str, expected: str = "a size, as in 24GiB") -> int:
    """Bytes, written with their unit."""
    if isinstance(node.value, str) and _SIZE.fullmatch(node.value):
        try:
            return env.n_bytes(node.value)
        except ValueError:
            pass
    fail(node.where, f"{what}: expected {expected}, found {node.describe()}")


def device_name(node: Node, what: str) -> str:
    """``cpu``, ``cuda:N`` or ``fake:N``, as rules spell them."""
    name = text(node, what)
    if not _DEVICE.fullmatch(name):
        near = _NEARLY_CUDA.fullmatch(name)
        guess = f"cuda:{near[1] or 0}" if near else "cpu" if name.lower() == "cpu" else ""
        hint = f"; did you mean {guess!r}?" if guess else ""
        fail(node.where, f"{what}: expected cpu, cuda:N or fake:N, found {name!r}{hint}")
    return name


def listed(known: Collection[str]) -> str:
    """``a, b or c``."""
    *most, last = known
    return f"{', '.join(most)} or {last}" if most else last


def nearest(word: str, known: Collection[str]) -> str:
    """A question, where one of ``known`` is near: ``experts`` to ``routed_experts``."""
    lowered = {name.lower(): name for name in known}
    ending = [name for name in lowered if name.endswith(f"_{word.lower()}")]
    close = ending or difflib.get_close_matches(word.lower(), lowered, n=1)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""
