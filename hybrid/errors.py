"""Every error a caller can act on.

A message says what failed, where, what was expected, what was found and the next step.
The classes differ by what the caller can do about them, not by where they were raised.
"""

from __future__ import annotations

import reprlib
from pathlib import Path


class HybridError(Exception):
    """Base class of all errors this package raises on purpose."""


class GGUFError(HybridError):
    """A model file is malformed, truncated or uses something this build cannot read.

    Attributes mirror the message so that tools need not parse it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path,
        key: str | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem, self.file = problem, str(file)
        self.key, self.tensor, self.offset = key, tensor, offset
        self.expected, self.found, self.hint = expected, found, hint
        where = [self.file]
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        if key is not None:
            where.append(f"key {key!r}")
        if offset is not None:
            where.append(f"offset {offset}")
        text = f"{', '.join(where)}: {problem}"
        if expected is not None or found is not None:
            text += f" (expected {expected}, found {found})"
        if hint is not None:
            text += f". {hint}"
        super().__init__(text)


class ModelError(HybridError):
    """A well-formed file does not describe a model this build can run."""


class TokenizerError(HybridError):
    """The vocabulary or chat template of a model is unusable."""


class PlacementError(HybridError):
    """A rule file or a device assignment is wrong."""


class CapacityError(HybridError):
    """Something does not fit: memory on a device, or tokens in the context."""


class DeviceError(HybridError):
    """Work on a device, or handed to the CPU by one, has failed. The model cannot go on; load it again."""


class DownloadError(HybridError):
    """A server cannot be reached, refuses, or sends something wrong.

    ``passing``: another try may help.
    """

    def __init__(self, problem: str, *, passing: bool = False) -> None:
        self.passing = passing
        super().__init__(problem)


class RequestError(HybridError, ValueError):
    """A prompt or a sampling parameter is invalid. The engine is unharmed.

    ``field`` names the parameter, ``expected`` and ``found`` say what is wrong with it.
    """

    def __init__(
        self, problem: str, *, field: str | None = None, expected: str | None = None, found: object = None
    ) -> None:
        self.problem, self.field, self.expected, self.found = problem, field, expected, found
        text = problem if field is None else f"{field}: {problem}"
        if expected is not None:
            text += f" (expected {expected}, found {reprlib.repr(found)})"
        super().__init__(text)


class ContextLengthError(RequestError, CapacityError):
    """A prompt does not fit the context. ``num_prompt_tokens`` and ``max_model_len`` say by how much."""

    def __init__(self, num_prompt_tokens: int, max_model_len: int) -> None:
        self.num_prompt_tokens, self.max_model_len = num_prompt_tokens, max_model_len
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, and the context of {max_model_len} takes at most "
            f"{max_model_len - 1} and one written token. Shorten it, or load the model with a larger context "
            "(max_model_len, -c)",
            field="prompt",
        )


class QueueFullError(RequestError):
    """Too many requests wait. ``num_waiting`` says how many; trying again later may work."""

    def __init__(self, num_waiting: int, problem: str = "too many requests wait; try again later") -> None:
        self.num_waiting = num_waiting
        super().__init__(f"{problem} ({num_waiting} waiting)")


class QueueTimeoutError(QueueFullError):
    """A request waited longer than it may and was dropped before any work on it."""

    def __init__(self, num_waiting: int, waited_s: float) -> None:
        self.waited_s = waited_s
        super().__init__(num_waiting, f"the request waited for {waited_s:.1f} s and was dropped")


class EngineError(HybridError):
    """The engine failed before and answers nothing more; the cause is attached. Load the model again."""


class ConfigError(HybridError, ValueError):
    """An option, environment variable or configuration value is invalid."""
