"""`GGUFFile`: typed metadata, tensor bytes, files that change under the reader, and the time to open."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybrid.errors import GGUFError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        writer.add_metadata("i", -7)
        writer.add_metadata("f", 0.5)
        writer.add_metadata("b", True)
        writer.add_metadata("strings", ["a", "ü", ""])
        writer.add_metadata("numbers", np.arange(5, dtype=np.int16))
        writer.add_metadata("flags", [True, False])
        writer.add_metadata("none", [], ValueType.STRING)
        writer.add_tensor("x", (3, 100), GGMLType.F32)
        writer.add_tensor("y", (2, 2, 32), GGMLType.Q8_0)
        writer.write_tensor("x", np.arange(300, dtype=np.float32))
        writer.write_tensor("y", bytes(range(136)))
    return path


def test_metadata_has_python_types(path: Path) -> None:
    with GGUFFile.open(path) as file:
        assert file.version == 3 and file.path == path and file.paths == [path]
        assert (file.metadata["i"], file.metadata["f"], file.metadata["b"]) == (-7, 0.5, True)
        assert file.metadata["strings"] == ["a", "ü", ""] and file.metadata["none"] == []
        numbers = file.metadata["numbers"]
        assert numbers.dtype == np.int16 and numbers.tolist() == [0, 1, 2, 3, 4]
        assert not numbers.flags.writeable
        assert file.metadata["flags"].dtype == np.bool_


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [("i", int, -7), ("f", float, 0.5), ("i", float, -7.0), ("b", bool, True),
     ("strings", list, ["a", "ü", ""]), ("general.architecture", str, "deepseek2")],
)  # fmt: skip
def test_get(path: Path, key: str, kind: type[Any], value: object) -> None:
    with GGUFFile.open(path) as file:
        found = file.get(key, kind)
    assert found == value and type(found) is kind


@pytest.mark.parametrize(
    ("key", "kind", "found"),
    [("f", int, "float 0.5"), ("b", int, "bool True"), ("i", bool, "int -7"), ("b", float, "bool True"),
     ("strings", str, "an array of 3 strings"), ("numbers", list, "an array of 5 int16"),
     ("i", np.ndarray, "int -7"), ("general.architecture", int, "str 'deepseek2'")],
)  # fmt: skip
def test_get_refuses_another_type(path: Path, key: str, kind: type[Any], found: str) -> None:
    with GGUFFile.open(path) as file, pytest.raises(GGUFError, match="wrong type") as caught:
        file.get(key, kind)
    assert caught.value.key == key and caught.value.found == found and caught.value.expected


def test_get_missing(path: Path) -> None:
    with GGUFFile.open(path) as file:
        assert file.get("nothing", int, default=None) is None
        with pytest.raises(GGUFError, match="required metadata is missing") as caught:
            file.get("nothing", int)
        assert caught.value.key == "nothing"
        with pytest.raises(GGUFError, match="wrong type"):
            file.get("f", int, default=3)  # a default never hides a wrong type


def test_data_and_read_into_agree(path: Path) -> None:
    with GGUFFile.open(path) as file:
        x = file.data("x")
        assert x.dtype == np.uint8 and not x.flags.writeable
        np.testing.assert_array_equal(x.view(np.float32), np.arange(300, dtype=np.float32))
        whole = np.empty(136, dtype=np.uint8)
        file.read_into("y", whole)
        assert whole.tobytes() == bytes(range(136)) == file.data("y").tobytes()
        part = bytearray(b"\xee" * 12)
        file.read_into("y", part, 34, 10)
        assert part == bytes(range(34, 44)) + b"\xee\xee"
        assert (file.tensors["y"].row_bytes, file.tensors["y"].n_elements) == (34, 128)
    np.testing.assert_array_equal(x[:8].view(np.float32), [0, 1])  # the array outlives the file object


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, 137), (130, 7), (137, None), (0, -1), (0, 21)])
def test_read_into_checks_the_range(path: Path, offset: int, length: int | None) -> None:
    buffer = bytearray(b"\xee" * 20 if length == 21 else b"\xee" * 300)
    with GGUFFile.open(path) as file, pytest.raises(GGUFError, match="outside a tensor") as caught:
        file.read_into("y", buffer, offset, length)
    assert caught.value.tensor == "y"
    assert set(buffer) == {0xEE}


def test_unknown_tensor_and_closed_file(path: Path) -> None:
    file = GGUFFile.open(path)
    with pytest.raises(GGUFError, match="no such tensor"):
        file.data("z")
    file.close()
    file.close()
    with pytest.raises(GGUFError, match="closed"):
        file.read_into("y", bytearray(136))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


def overwrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-64, os.SEEK_END)
        stream.write(bytes(8))
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    "change", [truncate, overwrite], ids=["16-truncated-while-open", "16-modified-while-open"]
)
@pytest.mark.parametrize("mapped", [False, True], ids=["read_into", "data"])
def test_hostile(path: Path, change: Callable[[Path], None], mapped: bool) -> None:
    with GGUFFile.open(path) as file:
        if mapped:
            file.data("x")
        change(path)
        with pytest.raises(GGUFError, match="changed since") as caught:
            if mapped:
                file.data("y")
            else:
                file.read_into("y", bytearray(136))
        assert caught.value.file == str(path)


def test_short_read_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut between the check and the read."""
    with GGUFFile.open(path) as file:
        pieces = iter([100, 0])

        def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
            return next(pieces)

        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(GGUFError, match="shorter") as caught:
            file.read_into("y", bytearray(136))
        assert caught.value.offset == file.tensors["y"].offset + 100


def test_failing_disk_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    with GGUFFile.open(path) as file:
        monkeypatch.setattr(os, "preadv", preadv)
        with pytest.raises(GGUFError, match="Input/output error"):
            file.read_into("y", bytearray(136))


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [("general.type", "adapter", "LoRA"), ("general.type", "mmproj", "projector"),
     ("general.type", "imatrix", "importance matrix"), ("general.architecture", "clip", "projector")],
    ids=["17-lora", "17-mmproj", "17-imatrix", "17-clip"],
)  # fmt: skip
def test_hostile_no_model(
    tmp_path: Path, gguf_bytes: SimpleNamespace, key: str, value: str, found: str
) -> None:
    parts = gguf_bytes.Parts().but(keys=[gguf_bytes.entry(key, 8, gguf_bytes.string(value))])
    with GGUFFile.open(parts.write(tmp_path / "m.gguf")) as file:
        with pytest.raises(GGUFError, match="no model") as caught:
            file.require_model()
        assert found in str(caught.value)


def test_hostile_17_vocabulary_only(tmp_path: Path, gguf_bytes: SimpleNamespace) -> None:
    parts = gguf_bytes.Parts().but(tensors=[], data=b"")
    with (
        GGUFFile.open(parts.write(tmp_path / "m.gguf")) as file,
        pytest.raises(GGUFError, match="vocabulary without weights"),
    ):
        file.require_model()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [([], "missing"), ([("general.architecture", 4, struct.pack("<I", 1))], "wrong type")],
    ids=["17-no-architecture", "17-architecture-is-a-number"],
)  # fmt: skip
def test_hostile_architecture(
    tmp_path: Path, gguf_bytes: SimpleNamespace, keys: list[tuple[str, int, bytes]], problem: str
) -> None:
    parts = gguf_bytes.Parts().but(keys=[gguf_bytes.entry(*key) for key in keys])
    with GGUFFile.open(parts.write(tmp_path / "m.gguf")) as file:
        with pytest.raises(GGUFError, match=problem) as caught:
            _ = file.architecture
        assert caught.value.key == "general.architecture"


def test_a_model_passes(path: Path) -> None:
    with GGUFFile.open(path) as file:
        file.require_model()


def test_large_header_opens_quickly(tmp_path: Path) -> None:
    """1,200 tensors, 130,000 tokens with scores and types, 130,000 merges: the size of a published file."""
    path = tmp_path / "m.gguf"
    words = [f"tök{i:06d}" for i in range(130_000)]
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        writer.add_metadata("tokenizer.ggml.tokens", words)
        writer.add_metadata("tokenizer.ggml.merges", [f"{a} {b}" for a, b in itertools.pairwise(words)])
        writer.add_metadata("tokenizer.ggml.scores", np.zeros(130_000, dtype=np.float32))
        writer.add_metadata("tokenizer.ggml.token_type", np.ones(130_000, dtype=np.int32))
        for i in range(1200):
            writer.add_tensor(f"blk.{i}.ffn_gate_exps.weight", (1, 32), GGMLType.Q8_0)
        for i in range(1200):
            writer.write_tensor(f"blk.{i}.ffn_gate_exps.weight", bytes(34))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with GGUFFile.open(path) as file:
            times.append(time.perf_counter() - start)
            assert file.metadata["tokenizer.ggml.tokens"] == words and len(file.tensors) == 1200
    assert min(times) < 0.5
