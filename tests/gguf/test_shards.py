"""Split files: opened from any shard, and refused where the shards do not fit together.

Faults are numbered as in `test_hostile`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hybrid.errors import GGUFError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter

NAMES = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]


def write_split(folder: Path, architecture: str = "deepseek2") -> list[Path]:
    with GGUFWriter(folder / "m.gguf", split_max_bytes=128) as writer:
        writer.add_metadata("general.architecture", architecture)
        for i in range(6):
            writer.add_tensor(f"t{i}", (16,), GGMLType.F32)
        for i in range(6):
            writer.write_tensor(f"t{i}", np.full(16, i, dtype=np.float32))
    return writer.paths


def edit(path: Path, old: bytes, new: bytes) -> None:
    """Replaces bytes that occur once, keeping the file's size."""
    content = path.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def split_entry(key: str, kind: int, fmt: str, value: int) -> bytes:
    return key.encode() + struct.pack("<I" + fmt, kind, value)


@pytest.mark.parametrize("opened", NAMES)
def test_any_shard_opens_all(tmp_path: Path, opened: str) -> None:
    write_split(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES
    with GGUFFile.open(tmp_path / opened) as file:
        assert [p.name for p in file.paths] == NAMES and file.path.name == NAMES[0]
        assert list(file.tensors) == [f"t{i}" for i in range(6)]
        assert [t.shard for t in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        assert file.architecture == "deepseek2"
        for i in range(6):
            assert (file.data(f"t{i}").view(np.float32) == i).all()
            buffer = np.empty(16, dtype=np.float32)
            file.read_into(f"t{i}", buffer)
            assert (buffer == i).all()


@pytest.mark.parametrize("count", [0, 1])
def test_merged_files_keep_a_split_count(tmp_path: Path, gguf_bytes: SimpleNamespace, count: int) -> None:
    """Tools that merge shards leave `split.count` 0 and a stale `split.no` behind."""
    entries = (
        gguf_bytes.entry("split.count", 2, struct.pack("<H", count)),
        gguf_bytes.entry("split.no", 2, struct.pack("<H", 0)),
        gguf_bytes.entry("split.tensors.count", 5, struct.pack("<i", 99)),
    )
    with GGUFFile.open(gguf_bytes.Parts().plus_key(*entries).write(tmp_path / "merged.gguf")) as file:
        assert len(file.tensors) == 2


def test_hostile_16_missing_shard(tmp_path: Path) -> None:
    write_split(tmp_path)[1].unlink()
    with pytest.raises(GGUFError, match="shards are missing") as caught:
        GGUFFile.open(tmp_path / NAMES[2])
    assert NAMES[1] in str(caught.value.found) and NAMES[0] not in str(caught.value.found)


def test_hostile_16_renamed_shard(tmp_path: Path) -> None:
    renamed = write_split(tmp_path)[1].rename(tmp_path / "other.gguf")
    with pytest.raises(GGUFError, match="its name does not match") as caught:
        GGUFFile.open(renamed)
    assert caught.value.found == "other.gguf" and "-of-00003.gguf" in str(caught.value.expected)


def test_hostile_16_swapped_shards(tmp_path: Path) -> None:
    first, second, _ = write_split(tmp_path)
    second.rename(tmp_path / "tmp")
    first.rename(second)
    (tmp_path / "tmp").rename(first)
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(first)
    assert caught.value.key == "split.no"


NO, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
U16, I16, I32 = (2, "H"), (3, "h"), (5, "i")
CASES = {
    "16-wrong-split.no": (1, split_entry(NO, *U16, 1), split_entry(NO, *U16, 7), NO),
    "16-wrong-split.count": (1, split_entry(COUNT, *U16, 3), split_entry(COUNT, *U16, 4), COUNT),
    "16-split.count-of-the-first": (0, split_entry(COUNT, *U16, 3), split_entry(COUNT, *U16, 4), COUNT),
    "16-split.count-huge": (0, split_entry(COUNT, *U16, 3), split_entry(COUNT, *U16, 65535), COUNT),
    "16-split.count-negative": (0, split_entry(COUNT, *U16, 3), split_entry(COUNT, *I16, -3), COUNT),
    "16-split.tensors.count": (0, split_entry(TENSORS, *I32, 6), split_entry(TENSORS, *I32, 7), TENSORS),
    "16-lacks-split.no": (2, b"split.no", b"split.xx", NO),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile(tmp_path: Path, case: str) -> None:
    shard, old, new, key = CASES[case]
    paths = write_split(tmp_path)
    edit(paths[shard], old, new)
    with pytest.raises(GGUFError) as caught:
        GGUFFile.open(paths[0])
    error = caught.value
    assert error.key == key and error.expected is not None and error.found is not None and error.hint


def test_hostile_16_shards_of_two_models_by_metadata(tmp_path: Path, gguf_bytes: SimpleNamespace) -> None:
    paths = write_split(tmp_path)
    entry = gguf_bytes.entry
    keys = [
        entry("general.architecture", 8, gguf_bytes.string("llama")),
        entry("split.no", 2, struct.pack("<H", 1)),
        entry("split.count", 2, struct.pack("<H", 3)),
        entry("split.tensors.count", 5, struct.pack("<i", 6)),
    ]
    gguf_bytes.Parts().but(keys=keys).write(paths[1])
    with pytest.raises(GGUFError, match="different models") as caught:
        GGUFFile.open(paths[0])
    assert caught.value.key == "general.architecture" and "llama" in str(caught.value.found)


def test_hostile_16_and_15_tensor_in_two_shards(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    edit(paths[1], b"\x02\0\0\0\0\0\0\0t2", b"\x02\0\0\0\0\0\0\0t1")
    with pytest.raises(GGUFError, match="in two shards") as caught:
        GGUFFile.open(paths[0])
    assert caught.value.tensor == "t1" and paths[0].name in str(caught.value.found)


def test_hostile_16_truncated_shard(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-40])
    with pytest.raises(GGUFError, match="bytes are missing") as caught:
        GGUFFile.open(paths[0])
    assert caught.value.file == str(paths[2])


def test_nothing_stays_open_after_an_error(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[2].write_bytes(b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(GGUFError):
        GGUFFile.open(paths[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
