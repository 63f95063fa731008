"""How much one operation of a template can make: a bound in characters, stated before it runs.

Only operations whose result can be far larger than their arguments need an entry; what is neither here
nor harmless is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.exceptions import SecurityError

from hybrid.chat.meter import LimitExceeded, meter

_MAX_INT_BITS = 1 << 12
_MAX_WIDTH_DIGITS = 4
_CHARS_PER_SLOT = 8

# Filters no chat template needs that hide backtracking in C, or percent-encode the marks of `marking`.
REFUSED_FILTERS = frozenset({"urlize", "xmlattr", "wordwrap", "striptags", "pprint", "urlencode"})
# Filters that do not walk into the items of their argument.
SHALLOW_FILTERS = frozenset(
    {"length", "count", "first", "last", "default", "d", "list", "reverse", "select", "reject", "selectattr",
     "rejectattr", "map", "items", "attr", "trim", "safe"}
)  # fmt: skip
EXPANDING_FILTERS = frozenset({"join", "sum", "sort", "unique", "min", "max", "groupby", "string"})

_STR_METHODS = frozenset(
    {"strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith", "lower", "upper",
     "title", "capitalize", "casefold", "swapcase", "find", "rfind", "index", "rindex", "count", "partition",
     "rpartition", "removeprefix", "removesuffix", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit",
     "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "replace",
     "join", "center", "ljust", "rjust", "zfill"}
)  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: _STR_METHODS,
    list: frozenset({"index", "count", "copy"}),
    tuple: frozenset({"index", "count"}),
    dict: frozenset({"get", "items", "keys", "values", "copy"}),
    int: frozenset({"bit_length"}),
    float: frozenset({"is_integer"}),
}


def of_operator(operator: str, left: Any, right: Any) -> int:
    """``left operator right`` for ``+ * ** %``."""
    if isinstance(left, int) and isinstance(right, int):
        return _of_integers(operator, left, right)
    if operator == "*":
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
                return of_result(sequence) * max(count, 0)
    if operator == "%" and isinstance(left, str | bytes):
        return of_percent(left, right)
    return of_result(left) + of_result(right)


def _of_integers(operator: str, left: int, right: int) -> int:
    if operator == "**":
        bits = left.bit_length() * abs(right)
    elif operator == "*":
        bits = left.bit_length() + right.bit_length()
    else:
        bits = max(left.bit_length(), right.bit_length()) + 1
    if bits > _MAX_INT_BITS:
        raise LimitExceeded(f"it computes with integers of more than {_MAX_INT_BITS} bits")
    return 1


def of_percent(template: str | bytes, values: Any) -> int:
    """``template % values``."""
    text = template if isinstance(template, str) else template.decode("latin-1")
    return _of_fields(text, text.count("%"), values)


def of_format(template: str, values: Any) -> int:
    """``template.format(...)``."""
    return _of_fields(template, template.count("{"), values)


def _of_fields(template: str, fields: int, values: Any) -> int:
    if "*" in template or re.search(rf"\d{{{_MAX_WIDTH_DIGITS + 1}}}", template):
        raise LimitExceeded("it formats with a very large or computed width")
    widest: int = 10**_MAX_WIDTH_DIGITS
    return len(template) + fields * (meter().look(values) + widest)


def of_method(owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """``owner.name(*args, **kwargs)`` for a method of a built-in type.

    Raises:
        SecurityError: the method is not offered to templates.
    """
    kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
    if kind is None or name not in _METHODS[kind]:
        raise SecurityError(f"{type(owner).__name__}.{name} is not offered to templates")
    looked = meter().look([*args, *kwargs.values()])
    if kind is not str:
        return meter().look(owner) if name in ("index", "count") else of_result(owner)
    if name == "replace" and len(args) >= 2:
        return _of_replace(owner, args[0], args[1])
    if name == "join":
        return looked + len(owner) * of_result(args[0] if args else "")
    if name in ("center", "ljust", "rjust", "zfill"):
        return len(owner) + _integer(args[0] if args else 0)
    return 3 * len(owner)


def of_filter(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """``value|name(...)``, ``args[0]`` being the value where the filter has one."""
    value = args[0] if args else ""
    given = [*args[1:], *kwargs.values()]
    if name == "replace" and len(args) >= 3:
        return _of_replace(str(value), str(args[1]), str(args[2]))
    if name == "format":
        return of_percent(str(value), given)
    if name == "join":
        return meter().look(value) + of_result(value) * meter().look(given)
    if name in ("center", "batch", "slice"):
        return of_result(value) + sum(_integer(item) for item in given if isinstance(item, int))
    if name in ("indent", "tojson"):
        widths = sum(_integer(item) if isinstance(item, int) else meter().look(item) for item in given)
        lines = value.count("\n") + 1 if isinstance(value, str) else 0
        return meter().look(value) + (lines or meter().look(value)) * widths
    if name == "round" and any(isinstance(item, int) and abs(item) > 100 for item in given):
        raise LimitExceeded("it rounds to more than 100 digits")
    if name == "sum" and any(not isinstance(item, int | float | str) for item in given):
        raise SecurityError("sum of other things than numbers is not offered to templates")
    return of_result(value)


def of_result(value: Any) -> int:
    """Length of a string, or slots of a list without what its items hold."""
    if isinstance(value, str | bytes):
        return len(value)
    return _CHARS_PER_SLOT * len(value) if isinstance(value, list | tuple | dict) else 1


def drained(args: Sequence[Any]) -> tuple[Any, ...]:
    """``args`` with iterators made lists, so that their cost can be told."""
    return tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)


def _of_replace(text: str, old: Any, new: Any) -> int:
    if not isinstance(old, str) or not isinstance(new, str):
        return len(text)
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _integer(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0
