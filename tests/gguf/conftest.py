"""A GGUF file as a list of parts, each of which a test can replace by something hostile."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def tensor(name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARCHITECTURE = entry("general.architecture", 8, string("deepseek2"))


@dataclass(frozen=True)
class Parts:
    """The default is a valid file: two F32 tensors of 8 and 4 values."""

    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    n_tensors: int | None = None
    n_keys: int | None = None
    keys: list[bytes] = field(default_factory=lambda: [ARCHITECTURE])
    tensors: list[bytes] = field(
        default_factory=lambda: [tensor("a.weight", [4, 2]), tensor("b.weight", [4], offset=32)]
    )
    padding: bytes | None = None
    data: bytes = bytes(range(64))
    cut: int | None = None

    def build(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        counts = struct.pack("<QQ", n_tensors % 2**64, n_keys % 2**64)
        header = self.magic + self.version + counts + b"".join(self.keys) + b"".join(self.tensors)
        padding = bytes(-len(header) % 32) if self.padding is None else self.padding
        return (header + padding + self.data)[: self.cut]

    def but(self, **changes: Any) -> Parts:
        return replace(self, **changes)

    def plus_key(self, *keys: bytes) -> Parts:
        return replace(self, keys=[*self.keys, *keys])

    def write(self, path: Path) -> Path:
        path.write_bytes(self.build())
        return path


@pytest.fixture
def gguf_bytes() -> SimpleNamespace:
    """The functions of this file."""
    return SimpleNamespace(string=string, entry=entry, array=array, tensor=tensor, Parts=Parts)
