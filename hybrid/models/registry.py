"""Architectures this build can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid.errors import ModelError
from hybrid.gguf import GGUFFile
from hybrid.models import deepseek2


@dataclass(frozen=True)
class Family:
    """How one architecture is read and built; see README.md in this folder."""

    read_config: Callable[[GGUFFile], Any]
    load: Callable[..., Any]


FAMILIES: dict[str, Family] = {
    "deepseek2": Family(deepseek2.read_config, deepseek2.load),
}


def family_of(file: GGUFFile) -> Family:
    """The family of a model file.

    Raises:
        GGUFError: the file names no architecture, or is no language model.
        ModelError: this build cannot run its architecture.
    """
    file.require_model()
    name = file.architecture
    if name not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{file.path}: architecture {name!r} is not supported; this build runs {supported}")
    return FAMILIES[name]
