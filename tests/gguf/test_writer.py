"""`GGUFWriter`: what it writes reads back, here and in the gguf package; what goes wrong leaves nothing."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.errors import GGUFError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType

SCALARS: dict[ValueType, st.SearchStrategy[Any]] = {
    ValueType.UINT8: st.integers(0, 2**8 - 1),
    ValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    ValueType.UINT16: st.integers(0, 2**16 - 1),
    ValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    ValueType.UINT32: st.integers(0, 2**32 - 1),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.UINT64: st.integers(0, 2**64 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(st.characters(codec="utf-8"), max_size=20),
}


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[ValueType, Any]:
    kind = draw(st.sampled_from(sorted(SCALARS)))
    one = SCALARS[kind]
    return kind, draw(st.one_of(one, st.lists(one, max_size=5)))


def open_and_list(path: Path) -> dict[str, Any]:
    with GGUFFile.open(path) as file:
        return {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in file.metadata.items()
        }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(typed_values(), max_size=8))
def test_metadata_round_trip(tmp_path: Path, values: list[tuple[ValueType, Any]]) -> None:
    path = tmp_path / "m.gguf"
    with GGUFWriter(path) as writer:
        for index, (kind, value) in enumerate(values):
            writer.add_metadata(f"k{index}", value, kind)
    assert open_and_list(path) == {f"k{index}": value for index, (_, value) in enumerate(values)}


def test_the_package_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    x = np.arange(6 * 4, dtype=np.float32).reshape(2, 3, 4)
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        writer.add_metadata("general.alignment", 64)
        writer.add_metadata("a.count", 7)
        writer.add_metadata("a.list", ["x", "y"])
        writer.add_metadata("a.eps", 0.5)
        writer.add_tensor("x", x.shape, GGMLType.F32)
        writer.add_tensor("y", (2, 32), GGMLType.Q8_0)
        writer.write_tensor("x", x)
        writer.write_tensor("y", bytes(68))
    reader = gguf.GGUFReader(path)
    assert reader.fields["a.count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["a.eps"].types == [gguf.GGUFValueType.FLOAT32]
    assert reader.fields["a.list"].contents() == ["x", "y"]
    assert [t.name for t in reader.tensors] == ["x", "y"]
    assert all(t.data_offset % 64 == 0 for t in reader.tensors)
    np.testing.assert_array_equal(reader.tensors[0].data, x)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(5, ValueType.UINT32), (-5, ValueType.INT32), (2**32, ValueType.UINT64), (-(2**31) - 1, ValueType.INT64),
     (0.5, ValueType.FLOAT32), (True, ValueType.BOOL), ("s", ValueType.STRING),
     (np.uint8(3), ValueType.UINT8)],
)  # fmt: skip
def test_types_that_follow_from_values(tmp_path: Path, value: object, kind: ValueType) -> None:
    with GGUFWriter(tmp_path / "m.gguf") as writer:
        writer.add_metadata("k", value)
    assert int(gguf.GGUFReader(tmp_path / "m.gguf").fields["k"].types[0]) == kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [(300, ValueType.UINT8), (-1, ValueType.UINT32), (1.5, ValueType.INT32), (1e39, ValueType.FLOAT32),
     (2**64, None), ([], None), ([1, "a"], None), ([[1]], None), (None, None), ({}, None),
     ("s", ValueType.INT32),
     (1, ValueType.BOOL), (True, ValueType.UINT8), ([1], ValueType.ARRAY), (np.zeros((2, 2)), None),
     (np.zeros(2, dtype=complex), None), (["a", 1], ValueType.STRING)],
)  # fmt: skip
def test_values_that_do_not_fit(tmp_path: Path, value: object, kind: ValueType | None) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf")
    with pytest.raises(GGUFError, match="cannot be stored") as caught:
        writer.add_metadata("k", value, kind)
    assert caught.value.key == "k"


def declared(path: Path) -> GGUFWriter:
    writer = GGUFWriter(path)
    writer.add_tensor("a", (2, 4), GGMLType.F32)
    writer.add_tensor("b", (4,), GGMLType.F32)
    return writer


def too_short(writer: GGUFWriter) -> None:
    writer.write_tensor("a", bytes(31))


def too_long(writer: GGUFWriter) -> None:
    writer.write_tensor("a", [bytes(16), bytes(17)])


def wrong_order(writer: GGUFWriter) -> None:
    writer.write_tensor("b", bytes(16))


def twice(writer: GGUFWriter) -> None:
    writer.write_tensor("a", bytes(32))
    writer.write_tensor("a", bytes(32))


def never_written(writer: GGUFWriter) -> None:
    writer.write_tensor("a", bytes(32))
    writer.close()


def late_tensor(writer: GGUFWriter) -> None:
    writer.write_tensor("a", bytes(32))
    writer.add_tensor("c", (4,), GGMLType.F32)


def late_key(writer: GGUFWriter) -> None:
    writer.write_tensor("a", bytes(32))
    writer.add_metadata("k", 1)


def failing_chunks(writer: GGUFWriter) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(16)
        raise KeyboardInterrupt

    writer.write_tensor("a", chunks())


@pytest.mark.parametrize(
    "misuse",
    [too_short, too_long, wrong_order, twice, never_written, late_tensor, late_key, failing_chunks],
    ids=lambda f: f.__name__,
)
def test_misuse_leaves_the_old_file_and_nothing_else(tmp_path: Path, misuse: Any) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises((GGUFError, KeyboardInterrupt)), declared(path) as writer:
        misuse(writer)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("misuse", [too_short, too_long, failing_chunks], ids=lambda f: f.__name__)
def test_a_tensor_that_failed_cannot_be_written_again(tmp_path: Path, misuse: Any) -> None:
    """Some of its bytes are in the file already: what came next would stand in the wrong place."""
    writer = declared(tmp_path / "m.gguf")
    with pytest.raises((GGUFError, KeyboardInterrupt)):
        misuse(writer)
    with pytest.raises(GGUFError, match="found failed"):
        writer.write_tensor("a", bytes(32))
    with pytest.raises(GGUFError, match="there is no file"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [("", (4,), GGMLType.F32), ("x" * 64, (4,), GGMLType.F32), ("a\n", (4,), GGMLType.F32),
     ("a", (4,), GGMLType.F32),
     ("c", (), GGMLType.F32), ("c", (0, 4), GGMLType.F32), ("c", (1,) * 5, GGMLType.F32),
     ("c", (33,), GGMLType.Q8_0), ("c", (3, 256), GGMLType.IQ2_K_R4)],
)  # fmt: skip
def test_tensors_that_cannot_be_declared(
    tmp_path: Path, name: str, shape: tuple[int, ...], kind: GGMLType
) -> None:
    with pytest.raises(GGUFError) as caught:
        declared(tmp_path / "m.gguf").add_tensor(name, shape, kind)
    assert caught.value.tensor == name and caught.value.expected is not None


@pytest.mark.parametrize("key", ["", "a\0b", "k", "split.count", "x" * 65536])
def test_keys_that_cannot_be_added(tmp_path: Path, key: str) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf")
    writer.add_metadata("k", 1)
    with pytest.raises(GGUFError):
        writer.add_metadata(key, 1)


@pytest.mark.parametrize("value", [0, 24, 2**31, "32", True])
def test_alignments_that_cannot_be_set(tmp_path: Path, value: object) -> None:
    with pytest.raises(GGUFError, match="alignment"):
        GGUFWriter(tmp_path / "m.gguf").add_metadata("general.alignment", value)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullFile:
        def __init__(self, path: Path, mode: str) -> None:
            path.touch()

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            pass

    monkeypatch.setattr("hybrid.gguf.writer.FileIO", FullFile)
    with pytest.raises(GGUFError, match="No space left"), declared(tmp_path / "m.gguf") as writer:
        writer.write_tensor("a", bytes(32))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot write the file: No such file"):
        declared(tmp_path / "no" / "m.gguf").write_tensor("a", bytes(32))


def test_a_forgotten_writer_cleans_up(tmp_path: Path) -> None:
    writer = declared(tmp_path / "m.gguf")
    writer.write_tensor("a", bytes(32))
    assert len(list(tmp_path.iterdir())) == 1
    del writer
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_in_memory(tmp_path: Path) -> None:
    """64 MiB go through in pieces of 1 MiB; the writer itself stays far below two pieces."""
    piece = np.ones(1 << 20, dtype=np.uint8)
    with GGUFWriter(tmp_path / "m.gguf") as writer:
        writer.add_tensor("a", (64 << 20,), GGMLType.I8)
        tracemalloc.start()
        writer.write_tensor("a", (piece for _ in range(64)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20
    assert (tmp_path / "m.gguf").stat().st_size > 64 << 20


def test_header_only(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with GGUFWriter(path, header_only=True) as writer:
        writer.add_tensor("a", (1 << 20, 1 << 20), GGMLType.F32)
    with GGUFFile.open(path, header_only=True) as file:
        assert file.tensors["a"].offset >= path.stat().st_size
    with pytest.raises(GGUFError, match="bytes are missing"):
        GGUFFile.open(path)


def test_header_only_takes_no_data(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "m.gguf", header_only=True) as writer:
        writer.add_tensor("a", (2, 4), GGMLType.F32)
        with pytest.raises(GGUFError, match="holds no tensor data"):
            writer.write_tensor("a", bytes(32))
    with GGUFFile.open(tmp_path / "m.gguf", header_only=True) as file:
        assert list(file.tensors) == ["a"]
