"""Mutated GGUF files either open or raise `GGUFError`: nothing else, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.errors import GGUFError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter

MAX_SECONDS = 2.0
MAX_BYTES = 8 << 20  # the reader's buffer grows by doubling, from a megabyte, and never past the file
INTERESTING = [0, 1, 2, 9, 31, 32, 33, 63, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
               2**61 + 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]  # fmt: skip

fuzz_settings = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def build(path: Path, split_max_bytes: int | None = None) -> list[bytes]:
    """Files with every kind of metadata and types with row meta and row groups."""
    with GGUFWriter(path, split_max_bytes=split_max_bytes) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        writer.add_metadata("general.alignment", 32)
        writer.add_metadata("a.bool", True)
        writer.add_metadata("a.float", 0.5)
        writer.add_metadata("a.u64", 2**63)
        writer.add_metadata("a.strings", ["the", "quick", "", "braun"])
        writer.add_metadata("a.numbers", np.arange(6, dtype=np.float32))
        writer.add_metadata("a.flags", [True, False])
        writer.add_tensor("f", (4, 8), GGMLType.F32)
        writer.add_tensor("q", (2, 3, 64), GGMLType.Q8_0)
        writer.add_tensor("k", (2, 256), GGMLType.IQ4_KS)
        writer.add_tensor("r", (4, 256), GGMLType.IQ2_K_R4)
        for name, n_bytes in {"f": 128, "q": 408, "k": 280, "r": 304}.items():
            writer.write_tensor(name, bytes(n_bytes))
    return [p.read_bytes() for p in writer.paths]


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    (content,) = build(tmp_path_factory.mktemp("seed") / "m.gguf")
    return content


def open_everything(path: Path) -> None:
    """Opens a file and reads all it claims to hold."""
    fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (a fraction of the cost of iterdir)
    try:
        with GGUFFile.open(path) as file:
            size = sum(p.stat().st_size for p in file.paths)
            assert sum(t.n_bytes for t in file.tensors.values()) <= size
            for name, info in file.tensors.items():
                buffer = np.empty(info.n_bytes, dtype=np.uint8)
                file.read_into(name, buffer)
                assert file.data(name).tobytes() == buffer.tobytes()
    except GGUFError as error:
        assert error.file in str(error)
    assert len(os.listdir("/proc/self/fd")) == fds  # noqa: PTH208


def check_bounded(path: Path) -> None:
    start = time.perf_counter()
    tracemalloc.start()
    try:
        open_everything(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert time.perf_counter() - start < MAX_SECONDS


def test_the_seed_opens(tmp_path: Path, seed_file: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(seed_file)
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == ["f", "q", "k", "r"]
    check_bounded(path)


@fuzz_settings
@given(data=st.data())
def test_mutated_bytes(tmp_path: Path, seed_file: bytes, data: st.DataObject) -> None:
    content = bytearray(seed_file)
    for _ in range(data.draw(st.integers(1, 6), label="edits")):
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        match data.draw(
            st.sampled_from(["byte", "u32", "u64", "delete", "insert", "repeat", "cut"]), label="edit"
        ):
            case "byte":
                content[at] = data.draw(st.integers(0, 255))
            case "u32":
                value = data.draw(st.sampled_from(INTERESTING)) % 2**32
                content[at : at + 4] = struct.pack("<I", value)
            case "u64":
                content[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from(INTERESTING)))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 16))]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
            case "repeat":
                content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
            case "cut":
                del content[at:]
        if not content:
            break
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    check_bounded(path)


@fuzz_settings
@given(content=st.binary(max_size=300), counts=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_random_bytes_after_a_valid_start(tmp_path: Path, content: bytes, counts: tuple[int, int]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + content)
    check_bounded(path)


@settings(parent=fuzz_settings, max_examples=150)
@given(data=st.data())
def test_mutated_shards(tmp_path: Path, data: st.DataObject) -> None:
    contents = [bytearray(content) for content in build(tmp_path / "m.gguf", split_max_bytes=500)]
    shard = data.draw(st.integers(0, len(contents) - 1), label="shard")
    content = contents[shard]
    # Mostly within the header, which is where the shards are tied together.
    at = data.draw(st.integers(0, min(len(content) - 1, 700)), label="at")
    content[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from(INTERESTING), label="value") % 2**32)
    count = len(contents)
    paths = [tmp_path / f"m-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for path, raw in zip(paths, contents, strict=True):
        path.write_bytes(raw)
    check_bounded(paths[data.draw(st.integers(0, count - 1), label="opened")])


def test_every_u32_of_the_header(tmp_path: Path, seed_file: bytes) -> None:
    """Every place of the header takes the values that overflow somewhere."""
    path = tmp_path / "m.gguf"
    end = seed_file.index(b"\x01\0\0\0\0\0\0\0r") + 60
    for at in range(end):
        for value in (0, 2**32 - 1):
            path.write_bytes(seed_file[:at] + struct.pack("<I", value) + seed_file[at + 4 :])
            open_everything(path)
