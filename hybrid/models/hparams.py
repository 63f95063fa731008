"""Strict reads of a model's hyper-parameters: each states its key, type, default and range."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from hybrid.errors import ModelError
from hybrid.gguf import GGUFFile
from hybrid.log import get_logger
from hybrid.models.compat import stand_in

logger = get_logger(__name__)
_REQUIRED: Any = object()


class HParams:
    """The ``<architecture>.*`` metadata of a file.

    A key that is missing takes its entry of the compatibility table, then its default, and otherwise raises
    `GGUFError`, as a value of the wrong type does. Impossible values raise `ModelError`.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.prefix = file, file.architecture + "."

    def integer(self, name: str, *, default: int = _REQUIRED, low: int = 1, high: int = 1 << 24) -> int:
        value: int = self._read(name, int, default)
        if not low <= value <= high:
            self.fail(name, f"from {low} to {high}", value)
        return value

    def number(
        self,
        name: str,
        *,
        default: float = _REQUIRED,
        above: float = 0.0,
        least: float | None = None,
        high: float = 1e12,
    ) -> float:
        """A finite number, larger than ``above`` (or at least ``least``), at most ``high``."""
        value: float = self._read(name, float, default)
        large_enough = value > above if least is None else value >= least
        if not (math.isfinite(value) and large_enough and value <= high):
            bound = f"above {above:g}" if least is None else f"of at least {least:g}"
            self.fail(name, f"a finite number {bound}, at most {high:g}", value)
        return value

    def flag(self, name: str, *, default: bool = _REQUIRED) -> bool:
        value: bool = self._read(name, bool, default)
        return value

    def word(self, name: str, allowed: tuple[str, ...], *, default: str = _REQUIRED) -> str:
        value: str = self._read(name, str, default)
        if value not in allowed:
            self.fail(name, " or ".join(repr(word) for word in allowed), repr(value))
        return value

    def only(self, name: str, supported: float) -> None:
        """Refuses any value but the one that this build can compute with; the key may be missing."""
        found = self._read(name, float, supported)
        if found != supported:
            self.fail(name, f"{supported:g}, all that this build supports", found)

    def has(self, name: str) -> bool:
        return self.prefix + name in self.file.metadata

    def fail(self, name: str, expected: str, found: object) -> NoReturn:
        """Raises ModelError for a value that no model of the family has."""
        raise ModelError(f"{self.file.path}: {self.prefix}{name}: expected {expected}, found {found}")

    def _read(self, name: str, kind: type, default: Any) -> Any:
        key = self.prefix + name
        if key not in self.file.metadata:
            replacement = stand_in(name, self.file)
            if replacement is not None:
                logger.info("%s: %s is missing: %s", self.file.path.name, key, replacement.reason)
                return replacement.value
            if default is not _REQUIRED:
                return default
        value = self.file.metadata.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in {int: "iu", float: "f"}.get(kind, ""):
            return kind(self._same_in_every_layer(name, value))
        return self.file.get(key, kind)

    def _same_in_every_layer(self, name: str, values: np.ndarray[Any, Any]) -> Any:
        num_blocks = self.file.get(self.prefix + "block_count", int)
        if len(values) != num_blocks:
            self.fail(name, f"one value, or one for each of the {num_blocks} blocks", f"{len(values)} values")
        if (values != values[0]).any():
            distinct = ", ".join(str(value) for value in np.unique(values)[:5])
            self.fail(name, "the same value for all blocks, all that this build supports", distinct)
        return values[0]
