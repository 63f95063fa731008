"""Which CPU kernels this process uses."""

from __future__ import annotations

from hybrid import env
from hybrid.errors import ConfigError
from hybrid.kernels import cpu


def select_isa(name: str | None = None) -> str:
    """Make ``name``, else ``HYBRID_ISA``, else the best of the host the ISA of this process.

    Raises:
        ConfigError: the name is unknown, or the host does not support it.
    """
    try:
        return str(cpu.select_isa(name or env.get("HYBRID_ISA")))
    except ValueError as error:
        raise ConfigError(f"{error} (--isa, HYBRID_ISA)") from None
