"""Every environment variable the runtime reads, in one table.

A variable is parsed when it is asked for; a bad value raises ``ConfigError`` that names the
variable, the value and what is accepted. Command-line flags and arguments win over variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid.errors import ConfigError


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


@dataclass(frozen=True)
class EnvVar:
    """One variable: how to parse it, and what to tell people about it."""

    parse: Callable[[str], Any]
    accepts: str
    purpose: str


VARIABLES: dict[str, EnvVar] = {
    "HYBRID_ISA": EnvVar(str, "an ISA this host supports (see `hybrid doctor`)", "force the CPU kernel ISA"),
    "HYBRID_NUM_THREADS": EnvVar(_positive_int, "an integer >= 1", "CPU worker threads"),
    "HYBRID_MODEL": EnvVar(str, "a GGUF path", "default of -m"),
    "HYBRID_LOG_LEVEL": EnvVar(
        str, "debug, info, warning or error", "log level of the command line"
    ),
}


def get(name: str) -> Any:
    """Parsed value of ``name``, or ``None`` when it is unset or empty.

    Raises:
        ConfigError: the value does not parse.
    """
    variable = VARIABLES[name]
    text = os.environ.get(name, "")
    if not text:
        return None
    try:
        return variable.parse(text)
    except ValueError:
        raise ConfigError(
            f"environment variable {name}={text!r} is invalid: expected {variable.accepts}"
        ) from None
