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

_NOT_MODELS = {
    "clip": "an image encoder (mmproj) that goes with a language model",
    "imatrix": "an importance matrix, used when a model is quantised",
}


def family_of(file: GGUFFile) -> Family:
    """The family of a model file.

    Raises:
        GGUFError: the file names no architecture.
        ModelError: it is not a language model, or of an architecture this build cannot run.
    """
    kind = file.get("general.type", str, default="model")
    name = file.architecture
    if kind in ("adapter", "imatrix", "mmproj", "vocab"):
        raise ModelError(
            f"{file.path}: this is no model but a file of type {kind!r}; give the model's own file"
        )
    if name in _NOT_MODELS:
        raise ModelError(f"{file.path}: this is {_NOT_MODELS[name]}; give the model's own file")
    if name not in FAMILIES:
        raise ModelError(
            f"{file.path}: architecture {name!r} is not supported; this build runs {', '.join(sorted(FAMILIES))}"
        )
    if not file.tensors:
        raise ModelError(
            f"{file.path}: the file has no tensors (a vocabulary alone?); give the model's own file"
        )
    return FAMILIES[name]
