"""Typed reads of tokeniser keys: each fault is a ``TokenizerError`` that names the key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid.errors import TokenizerError

Metadata = Mapping[str, Any]


def read_text(metadata: Metadata, key: str) -> str | None:
    """A string value, or ``None`` when the key is missing."""
    value = metadata.get(key)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{key}: expected a string, found {_kind(value)}")
    return value


def read_flag(metadata: Metadata, key: str, default: bool) -> bool:
    """A boolean value, or ``default`` when the key is missing."""
    value = metadata.get(key)
    if value is None:
        return default
    if not isinstance(value, bool | np.bool_):
        raise TokenizerError(f"{key}: expected a boolean, found {_kind(value)}")
    return bool(value)


def read_id(metadata: Metadata, key: str, num_tokens: int) -> int | None:
    """A token id in [0, num_tokens), or ``None`` when the key is missing."""
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TokenizerError(f"{key}: expected a token id, found {_kind(value)}")
    if not 0 <= value < num_tokens:
        raise TokenizerError(
            f"{key}: token id {value} is out of range: the vocabulary has {num_tokens} tokens"
        )
    return int(value)


def read_strings(metadata: Metadata, key: str) -> list[str] | None:
    """An array of strings that encode as UTF-8, or ``None`` when the key is missing."""
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TokenizerError(f"{key}: expected an array of strings, found {_kind(value)}")
    strings = value if isinstance(value, list) else list(value)
    try:
        "".join(strings).encode()
    except TypeError:
        index, item = next((i, item) for i, item in enumerate(strings) if not isinstance(item, str))
        raise TokenizerError(f"{key}: expected strings, found {_kind(item)} at index {index}") from None
    except UnicodeEncodeError:
        index = next(i for i, item in enumerate(strings) if _has_surrogate(item))
        raise TokenizerError(
            f"{key}: the string at index {index} ({strings[index]!r}) holds a lone surrogate: not valid UTF-8"
        ) from None
    return strings


def read_numbers(metadata: Metadata, key: str, count: int, dtype: type[np.generic]) -> Any:
    """An array of ``count`` finite numbers as ``dtype`` [count], or ``None`` when the key is missing."""
    value = metadata.get(key)
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise TokenizerError(f"{key}: expected an array of numbers, found {_kind(value)}")
    numbers = np.asarray(value)
    kinds = "iu" if issubclass(dtype, np.integer) else "iuf"
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in kinds):
        raise TokenizerError(
            f"{key}: expected an array of {dtype.__name__}, found {numbers.dtype} of shape {numbers.shape}"
        )
    if numbers.size != count:
        raise TokenizerError(
            f"{key}: expected {count} entries, one for each of tokenizer.ggml.tokens, found {numbers.size}"
        )
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        index = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise TokenizerError(f"{key}: the entry at index {index} is {numbers[index]}, not a finite number")
    return numbers.astype(dtype)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _kind(value: object) -> str:
    return f"{type(value).__name__} ({str(value)[:40]!r})"
