"""Bytes as people read them in plans."""

from __future__ import annotations

_GIB, _MIB = 1 << 30, 1 << 20


def size_text(n_bytes: int) -> str:
    """``3.25 GiB``; less than a tenth of one in MiB, ``20.5 MiB``."""
    return f"{n_bytes / _GIB:.2f} GiB" if n_bytes >= _GIB // 10 else f"{n_bytes / _MIB:.1f} MiB"
