"""Malformed files: each ends in a `GGUFError` that says what, where, expected and found.

Cases are numbered by the kind of damage: 1 truncation and files of another kind, 2 magic, 3 version,
4 impossible counts, 5 counts off by one, 6 keys and strings, 7 duplicate keys, 8 value types and arrays,
9 alignment, 10 dimensions, 11 tensor types, 12 rows and blocks, 13 offsets, 14 overlaps and missing data,
15 tensor names; elsewhere in this folder 16 shards, 17 files that are no model and 22 damaged tensor data.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from hybrid.errors import GGUFError
from hybrid.gguf import GGUFFile


def _load_parts() -> ModuleType:
    """`conftest.py` as a module: the table below is made before fixtures exist."""
    spec = importlib.util.spec_from_file_location("gguf_parts", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gguf_parts"] = module
    spec.loader.exec_module(module)
    return module


_parts = _load_parts()
Parts, entry, array, string, tensor, ARCHITECTURE = (
    _parts.Parts, _parts.entry, _parts.array, _parts.string, _parts.tensor, _parts.ARCHITECTURE
)  # fmt: skip

VALID = Parts()
BIG = 2**63
U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
Q4_0, Q8_0, Q4_K, IQ4_KS, IQ2_K_R4 = 2, 8, 12, 144, 337


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def nested(depth: int) -> bytes:
    return entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQI", U32, 1, 7))


def alignment(kind: int, payload: bytes) -> bytes:
    return VALID.plus_key(entry("general.alignment", kind, payload)).build()


def one_tensor(*args: object, **kwargs: object) -> bytes:
    return VALID.but(tensors=[tensor(*args, **kwargs)]).build()


def second_offset(offset: int) -> bytes:
    return VALID.but(tensors=[tensor("a.weight", [4, 2]), tensor("b.weight", [4], offset=offset)]).build()


@dataclass(frozen=True)
class Case:
    """A file and the error it must give."""

    id: str
    content: bytes
    problem: str
    key: str | None = None
    tensor: str | None = None
    hint: str = ""


K, A, B = "k", "a.weight", "b.weight"
CASES = [
    Case("01-empty", b"", "file is empty"),
    Case("01-23-bytes", VALID.but(cut=23).build(), "ends within the header"),
    Case("01-3-bytes", b"GGU", "ends within the header"),
    Case("01-cut-in-key", VALID.but(cut=30).build(), "ends within|too long|impossible"),
    Case("01-cut-in-tensor-index", VALID.but(cut=120).build(), "ends within", tensor=A),
    Case("01-lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
         "wrong magic",
         hint="Git LFS"),
    Case("02-safetensors", struct.pack("<Q", 90) + b'{"a":{"dtype":"F32"}}' + bytes(90), "wrong magic",
         hint="safetensors"),
    Case("02-zip", b"PK\x03\x04" + bytes(60), "wrong magic", hint="zip"),
    Case("02-ggml", b"lmgg" + bytes(60), "wrong magic", hint="GGML"),
    Case("02-upper-ggml", b"GGML" + bytes(60), "wrong magic", hint="GGML"),
    Case("02-pickle", b"\x80\x02}q\x00" + bytes(60), "wrong magic", hint="pickle"),
    Case("02-html", b"<!DOCTYPE html><html>" + bytes(60), "wrong magic", hint="web page"),
    Case("02-zeros", bytes(64), "wrong magic", hint="zeros"),
    Case("02-unknown", b"abcdefgh" + bytes(60), "wrong magic", hint="not a GGUF file"),
    Case("03-version-0", VALID.but(version=u32(0)).build(), "unsupported GGUF version"),
    Case("03-version-1", VALID.but(version=u32(1)).build(), "unsupported GGUF version"),
    Case("03-version-4", VALID.but(version=u32(4)).build(), "unsupported GGUF version"),
    Case("03-big-endian", VALID.but(version=struct.pack(">I", 3)).build(), "unsupported GGUF version",
         hint="big-endian"),
    Case("04-n_tensors-negative", VALID.but(n_tensors=-1).build(), "impossible tensor count"),
    Case("04-n_tensors-huge", VALID.but(n_tensors=2**40).build(), "impossible tensor count"),
    Case("04-n_tensors-larger-than-file", VALID.but(n_tensors=len(VALID.build())).build(),
         "impossible tensor count"),
    Case("04-n_kv-negative", VALID.but(n_keys=-1).build(), "impossible key count"),
    Case("04-n_kv-huge", VALID.but(n_keys=2**40).build(), "impossible key count"),
    Case("05-n_tensors-one-too-many", VALID.but(n_tensors=3).build(), "empty tensor name", hint="count"),
    Case("05-n_tensors-one-too-few", VALID.but(n_tensors=1).build(), "padding .* is not zero",
         hint="too small"),
    Case("05-n_tensors-one-too-few-with-a-MiB-of-padding",
         VALID.but(n_tensors=1, keys=[ARCHITECTURE, entry("general.alignment", U32, u32(1 << 20))],
                   padding=b"\1" * (1 << 20)).build(), "padding .* is not zero", hint="too small"),
    Case("05-n_kv-one-too-many", VALID.but(n_keys=2).build(), "."),
    Case("05-n_kv-one-too-many-before-padding", VALID.but(n_keys=2, tensors=[], data=bytes(64)).build(),
         "empty metadata key", hint="key count"),
    Case("06-key-longer-than-file", VALID.but(keys=[struct.pack("<Q", 5000) + b"abc"]).build(), "too long"),
    Case("06-key-length-2^63", VALID.but(keys=[struct.pack("<Q", BIG) + b"abc"]).build(), "too long"),
    Case("06-key-over-64-KiB", VALID.plus_key(entry("x" * 65536, U32, u32(1))).build(), "key is too long"),
    Case("06-string-longer-than-file", VALID.plus_key(entry(K, STRING, struct.pack("<Q", 2**20))).build(),
         "too long", key=K),
    Case("06-string-length-2^64-1", VALID.plus_key(entry(K, STRING, struct.pack("<Q", 2**64 - 1))).build(),
         "too long", key=K),
    Case("06-empty-key", VALID.plus_key(entry("", U32, u32(1))).build(), "empty metadata key"),
    Case("06-invalid-utf8-key", VALID.plus_key(entry(b"\xff\xfe", U32, u32(1))).build(), "not UTF-8"),
    Case("06-invalid-utf8-value", VALID.plus_key(entry(K, STRING, string(b"ab\xc3("))).build(), "not UTF-8",
         key=K),
    Case("06-lone-surrogate-in-array",
         VALID.plus_key(entry(K, ARRAY, array(STRING, 2, string("ok") + string(b"\xed\xa0\x80")))).build(),
         "string 1 of an array is not UTF-8", key=K),
    Case("06-control-character-in-key", VALID.plus_key(entry("a\nb", U32, u32(1))).build(),
         "control character"),
    Case("07-duplicate-key", VALID.plus_key(entry(K, U32, u32(1)), entry(K, U32, u32(1))).build(),
         "duplicate metadata key", key=K),
    Case("08-unknown-type", VALID.plus_key(entry(K, 13, u32(1))).build(), "unknown value type", key=K),
    Case("08-unknown-type-huge", VALID.plus_key(entry(K, 2**32 - 1, u32(1))).build(), "unknown value type",
         key=K),
    Case("08-unknown-element-type", VALID.plus_key(entry(K, ARRAY, array(99, 1, u32(1)))).build(),
         "unknown array element type", key=K),
    Case("08-nested-array", VALID.plus_key(nested(1)).build(), "nested arrays", key=K),
    Case("08-2000-deep-array", VALID.plus_key(nested(2000)).build(), "nested arrays", key=K),
    Case("08-array-larger-than-file", VALID.plus_key(entry(K, ARRAY, array(U32, 2**20, u32(1)))).build(),
         "impossible array length", key=K),
    Case("08-array-count-2^64-1", VALID.plus_key(entry(K, ARRAY, array(U8, 2**64 - 1, u32(1)))).build(),
         "impossible array length", key=K),
    Case("08-string-array-larger-than-file", VALID.plus_key(entry(K, ARRAY, array(STRING, 2**20,
         b""))).build(),
         "impossible array length", key=K),
    Case("08-string-array-cut", VALID.plus_key(entry(K, ARRAY, array(STRING, 2,
         string("a") + u32(9) * 4))).build(),
         "string 1 of an array is too long", key=K),
    Case("08-boolean-2", VALID.plus_key(entry(K, BOOL, b"\x02")).build(), "neither 0 nor 1", key=K),
    Case("08-boolean-array-2", VALID.plus_key(entry(K, ARRAY, array(BOOL, 3, b"\x01\x00\x02"))).build(),
         "neither 0 nor 1", key=K),
    Case("09-alignment-0", alignment(U32, u32(0)), "impossible alignment", key="general.alignment"),
    Case("09-alignment-24", alignment(U32, u32(24)), "impossible alignment", key="general.alignment"),
    Case("09-alignment-4", alignment(U32, u32(4)), "impossible alignment", key="general.alignment"),
    Case("09-alignment-2^31", alignment(U32, u32(2**31)), "impossible alignment", key="general.alignment"),
    Case("09-alignment-string", alignment(STRING, string("32")), "wrong type of alignment",
         key="general.alignment"),
    Case("09-alignment-bool", alignment(BOOL, b"\x01"), "wrong type of alignment", key="general.alignment"),
    Case("09-alignment-float", alignment(F32, struct.pack("<f", 32)), "wrong type of alignment",
         key="general.alignment"),
    Case("10-5-dims", one_tensor(A, [1, 1, 1, 1, 1]), "impossible number of dimensions", tensor=A),
    Case("10-0-dims", one_tensor(A, []), "impossible number of dimensions", tensor=A),
    Case("10-2^32-dims", VALID.but(tensors=[string(A) + u32(2**32 - 1) + bytes(40)]).build(),
         "impossible number of dimensions", tensor=A),
    Case("10-zero-dim", one_tensor(A, [4, 0]), "impossible dimension", tensor=A),
    Case("10-dim-2^63", one_tensor(A, [BIG]), "impossible dimension", tensor=A),
    Case("10-dim-minus-1", one_tensor(A, [2**64 - 1]), "impossible dimension", tensor=A),
    Case("10-product-2^64", one_tensor(A, [2**32, 2**32]), "too many elements", tensor=A),
    Case("10-product-wraps-to-8", one_tensor(A, [2**61 + 1, 8]), "too many elements", tensor=A),
    Case("10-bytes-2^63", one_tensor(A, [2**62]), "does not fit the type: .* bytes are more", tensor=A),
    Case("11-unknown-type", one_tensor(A, [32], 77), "unknown tensor type", tensor=A, hint="newer or other"),
    Case("11-type-2^32-1", one_tensor(A, [32], 2**32 - 1), "unknown tensor type", tensor=A),
    Case("11-removed-Q4_2", one_tensor(A, [32], 4), "unknown tensor type", tensor=A, hint="Q4_2, removed"),
    Case("11-removed-Q4_0_8_8", one_tensor(A, [32], 33), "unknown tensor type", tensor=A, hint="Q4_0_8_8"),
    Case("11-activation-type", one_tensor(A, [256], 99), "unknown tensor type", tensor=A, hint="activations"),
    Case("12-row-of-33-Q8_0", one_tensor(A, [33], Q8_0), "no multiple of Q8_0's block of 32", tensor=A),
    Case("12-row-of-128-Q4_K", one_tensor(A, [128, 2], Q4_K), "no multiple of Q4_K's block of 256", tensor=A),
    Case("12-row-of-128-IQ4_KS", one_tensor(A, [128, 2], IQ4_KS), "no multiple of IQ4_KS's block", tensor=A),
    Case("12-group-of-4-rows", one_tensor(A, [256, 6], IQ2_K_R4), "do not fill IQ2_K_R4's groups of 4",
         tensor=A),
    Case("12-group-across-experts", one_tensor(A, [256, 2, 2], IQ2_K_R4), "do not fill", tensor=A),
    Case("13-gap", second_offset(64), "leaves a gap", tensor=B),
    Case("13-misaligned", second_offset(33), "not aligned", tensor=B),
    Case("13-past-the-end", second_offset(2**40), "leaves a gap", tensor=B),
    Case("13-wraps-2^64", second_offset(2**64 - 32), "leaves a gap", tensor=B),
    Case("13-first-offset-32", one_tensor(A, [4], offset=32), "leaves a gap", tensor=A),
    Case("14-overlap", second_offset(0), "overlaps", tensor=B),
    Case("14-truncated-in-last", VALID.but(data=bytes(40)).build(), "8 bytes are missing", tensor=B,
         hint="resume"),
    Case("14-truncated-in-first", VALID.but(data=bytes(16)).build(), "32 bytes are missing", tensor=A),
    Case("14-no-data", VALID.but(data=b"").build(), "48 bytes are missing", tensor=A),
    Case("14-no-padding", VALID.but(data=b"", padding=b"").build(), "bytes are missing", tensor=A),
    Case("15-duplicate-name", VALID.but(tensors=[tensor(A, [4, 2]), tensor(A, [4], offset=32)]).build(),
         "duplicate tensor name", tensor=A),
    Case("15-name-of-64-bytes", one_tensor("x" * 64, [4]), "tensor name is too long", tensor="x" * 64),
    Case("15-name-longer-than-file", VALID.but(tensors=[struct.pack("<Q", 2**62) + bytes(40)]).build(),
         "too long"),
    Case("15-name-with-nul", one_tensor("a\0b", [4]), "control character", tensor="a\0b"),
    Case("15-name-with-newline", one_tensor("a\nb", [4]), "control character", tensor="a\nb"),
    Case("15-invalid-utf8-name", one_tensor(b"\xff", [4]), "not UTF-8"),
]  # fmt: skip


def count_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_valid_file_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The cases below differ from this file in one thing each."""
    with caplog.at_level(logging.WARNING, "hybrid"), GGUFFile.open(VALID.write(tmp_path / "m.gguf")) as file:
        assert file.architecture == "deepseek2"
        assert [(t.name, t.shape) for t in file.tensors.values()] == [(A, (2, 4)), (B, (4,))]
        assert file.data(B).tobytes() == bytes(range(32, 48))
    assert not caplog.records


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_hostile(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(case.content)
    fds = count_open_files()
    with pytest.raises(GGUFError, match=case.problem) as caught:
        GGUFFile.open(path)
    error = caught.value
    assert error.file == str(path) and str(path) in str(error)
    assert (error.key, error.tensor) == (case.key, case.tensor) or case.id == "05-n_kv-one-too-many"
    assert error.offset is not None and error.offset >= 0
    assert error.expected is not None and error.found is not None
    assert case.hint in (error.hint or "")
    assert len(str(error)) < 1000
    assert count_open_files() == fds


def test_hostile_01_every_truncation(tmp_path: Path) -> None:
    """A file cut anywhere before the end of its data is refused."""
    whole = VALID.build()
    path = tmp_path / "m.gguf"
    for size in range(len(whole) - 16):  # the last 16 bytes are padding of the last tensor
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            GGUFFile.open(path)
    path.write_bytes(whole[:-16])
    GGUFFile.open(path).close()


def make_directory(path: Path) -> None:
    path.mkdir()


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        pytest.param(make_directory, "a directory", id="01-directory"),
        pytest.param(os.mkfifo, "a pipe", id="01-fifo"),
        pytest.param(make_dangling_link, "No such file", id="01-dangling-link"),
        pytest.param(lambda path: None, "No such file", id="01-missing"),
    ],
)
def test_hostile_kind_of_file(make: Callable[[Path], None], found: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    with pytest.raises(GGUFError, match=found) as caught:
        GGUFFile.open(path)
    assert caught.value.file == str(path)


def test_hostile_01_nul_in_path() -> None:
    with pytest.raises(GGUFError, match="cannot open"):
        GGUFFile.open("a\0b.gguf")


def test_hostile_14_trailing_bytes_only_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = VALID.but(data=bytes(64 + 7)).write(tmp_path / "m.gguf")
    with caplog.at_level(logging.WARNING, "hybrid"), GGUFFile.open(path) as file:
        assert len(file.tensors) == 2
    assert "7 bytes after the last tensor" in caplog.text


def test_huge_sparse_header_is_refused_without_reading_it(tmp_path: Path) -> None:
    """A length that the size of the file allows is still bounded."""
    path = tmp_path / "m.gguf"
    path.write_bytes(VALID.but(keys=[entry(K, STRING, struct.pack("<Q", 2**40))], tensors=[]).build())
    os.truncate(path, 2**41)
    with pytest.raises(GGUFError, match="too long") as caught:
        GGUFFile.open(path)
    assert caught.value.key == K


def test_header_only_accepts_missing_data(tmp_path: Path) -> None:
    path = VALID.but(data=b"").write(tmp_path / "m.gguf")
    with GGUFFile.open(path, header_only=True) as file:
        assert file.tensors[B].n_bytes == 16
        with pytest.raises(GGUFError, match=r"shorter|ends"):
            file.read_into(B, bytearray(16))
