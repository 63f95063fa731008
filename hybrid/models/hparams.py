"""Strict reads of a model's hyper-parameters: each states its key, type, default and range."""

from __future__ import annotations

import math
from typing import Any

from hybrid.errors import ModelError
from hybrid.gguf import GGUFFile
from hybrid.log import get_logger
from hybrid.models.compat import stand_in

logger = get_logger(__name__)
_REQUIRED: Any = object()


class HParams:
    """The ``<architecture>.*`` metadata of a file."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.prefix = file, file.architecture + "."

    def integer(self, name: str, *, default: int = _REQUIRED, low: int = 1, high: int = 1 << 24) -> int:
        value: int = self._read(name, int, default)
        if not low <= value <= high:
            self.fail(name, f"from {low} to {high}", value)
        return value

    def number(self, name: str, *, default: float = _REQUIRED, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number, above ``low``."""
        value: float = self._read(name, float, default)
        if not math.isfinite(value) or not low < value <= high:
            self.fail(name, f"a finite number above {low:g}, at most {high:g}", value)
        return value

    def flag(self, name: str, *, default: bool = _REQUIRED) -> bool:
        value: bool = self._read(name, bool, default)
        return value

    def has(self, name: str) -> bool:
        return self.prefix + name in self.file.metadata

    def _read(self, name: str, kind: type, default: Any) -> Any:
        key = self.prefix + name
        if key not in self.file.metadata:
            replacement = stand_in(name, self.file)
            if replacement is not None:
                logger.info("%s: %s is missing: %s", self.file.path.name, key, replacement.reason)
                return replacement.value
            if default is not _REQUIRED:
                return default
        return self.file.get(key, kind)

    def fail(self, name: str, expected: str, found: object) -> None:
        """Raises ModelError for a value that no model of the family has."""
        raise ModelError(f"{self.file.path}: {self.prefix}{name}: expected {expected}, found {found}")
