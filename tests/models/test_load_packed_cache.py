"""The cache of packed weights: the same model from it, and nothing that is stale, cut short or foreign."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
from hybrid.kernels import cpu

from hybrid.backends import packed_cache
from hybrid.backends.packed_cache import PackedFile, cache_path
from hybrid.cli.main import main
from hybrid.config import model_path
from hybrid.errors import CapacityError
from hybrid.gguf import GGUFFile
from hybrid.kvcache.blocks import BLOCK_SIZE, AttentionBatch
from hybrid.models.loader import load_model
from hybrid.placement.planner import plan

IDS = torch.arange(5, 15, dtype=torch.int32)


def logits(path, cache=None, **options):
    with GGUFFile.open(path) as file:
        model = load_model(file, plan=plan(file), max_model_len=64, packed_cache=cache, **options)
    try:
        model.allocate_cache(1)
        count = len(IDS)
        positions = torch.arange(count, dtype=torch.int32)
        batch = AttentionBatch(
            positions=positions,
            slot_mapping=positions.clone(),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([count], dtype=torch.int32),
            block_tables=torch.zeros((1, 1), dtype=torch.int32),
        )
        assert count <= BLOCK_SIZE
        return model.compute_logits(model.forward(IDS, batch))
    finally:
        model.close()


@pytest.fixture(scope="module")
def expected():
    return logits(model_path("demo"))


@pytest.fixture
def copy(tmp_path):
    path = tmp_path / "copy.gguf"
    path.write_bytes(model_path("demo").read_bytes())
    return path


def test_first_start_writes_and_later_ones_map(copy, tmp_path, expected, monkeypatch):
    cache = tmp_path / "cache"
    assert torch.equal(logits(copy, cache), expected)
    (written,) = cache.iterdir()

    def fail(*args):
        raise AssertionError("nothing is packed again")

    monkeypatch.setattr("hybrid.backends.cpu.CpuBackend._pack_ahead", fail)
    calls = []
    assert torch.equal(logits(copy, cache, progress=lambda *args: calls.append(args)), expected)
    assert calls[-1][0] == calls[-1][1]
    assert list(cache.iterdir()) == [written]


def test_weights_for_nodes_are_copied(copy, tmp_path, expected, monkeypatch):
    """As on a machine with two nodes, but for the binding."""
    from hybrid.placement import numa

    cache = tmp_path / "cache"
    logits(copy, cache)
    seen = set()
    real = numa.layout

    def two(mode, side, shape, nodes):
        found = real("replicate" if side != "hidden_cols" or shape[2] < 512 else "shard", side, shape, (0, 1))
        seen.add(found.division)
        return numa.Layout(found.division, (-1,) * len(found.nodes), found.cuts)

    monkeypatch.setattr("hybrid.backends.cpu.layout", two)
    found = logits(copy, cache)
    assert {"copies", "cols"} <= seen
    assert torch.allclose(found, expected, atol=1e-4) and found.argmax(-1).equal(expected.argmax(-1))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut short":
        del data[-4096:]
    elif how == "no such file":
        data[:8] = b"GGUFGGUF"
    elif how == "another model":
        data = data.replace(b'"layout": 1', b'"layout": 2', 1)
    elif how == "points outside":
        length = int.from_bytes(data[8:16], "little")
        index = json.loads(data[16 : 16 + length])
        key = next(iter(index["entries"]))
        index["entries"][key][1] = len(data)
        text = json.dumps(index).encode()
        data[8:16] = len(text).to_bytes(8, "little")
        data[16 : 16 + len(text)] = text
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut short", "no such file", "another model", "points outside"])
def test_what_cannot_be_trusted_is_made_anew(copy, tmp_path, expected, how, caplog):
    cache = tmp_path / "cache"
    logits(copy, cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    damage(path, how)
    with caplog.at_level(logging.WARNING, logger="hybrid"):
        assert torch.equal(logits(copy, cache), expected)
    assert "cannot be used" in caplog.text
    assert path.read_bytes() == whole


def test_a_changed_model_has_another_cache(copy, tmp_path):
    with GGUFFile.open(copy) as file:
        before = cache_path(file, tmp_path)
    os.utime(copy, ns=(1, 1))
    with GGUFFile.open(copy) as file:
        assert cache_path(file, tmp_path) != before


def test_a_full_disk_is_told_before_anything_is_written(copy, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CapacityError, match="1000 are free"):
        logits(copy, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


KILLED = """
import sys, time
from pathlib import Path
from hybrid.backends.packed_cache import PackedWriter
plain = PackedWriter.write
def slow(self, key, data):
    plain(self, key, data)
    print(key, flush=True)
    time.sleep(0.2)
PackedWriter.write = slow
from hybrid.cli.main import main
main(["pack", sys.argv[1], "-o", sys.argv[2]])
"""


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_cache(copy, tmp_path, expected):
    cache = tmp_path / "cache"
    command = [sys.executable, "-P", "-c", KILLED, str(copy), str(cache)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stdout.readline()
    program.send_signal(signal.SIGKILL)
    program.wait(20)
    assert [path.name.startswith(".") for path in cache.iterdir()] == [True]
    assert torch.equal(logits(copy, cache), expected)
    with GGUFFile.open(copy) as file:
        assert list(cache.iterdir()) == [cache_path(file, cache)]


def test_two_writers_do_not_meet(copy, tmp_path, expected, caplog):
    cache = tmp_path / "cache"
    command = [sys.executable, "-P", "-c", KILLED, str(copy), str(cache)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stdout.readline()
    try:
        with caplog.at_level(logging.WARNING, logger="hybrid"):
            assert torch.equal(logits(copy, cache), expected)
        assert "another process is writing" in caplog.text
    finally:
        program.kill()
        program.wait(20)


def test_pack_command(copy, tmp_path, capsys, expected):
    cache = tmp_path / "cache"
    assert main(["pack", str(copy), "-o", str(cache)]) == 0
    assert "written" in capsys.readouterr().out
    assert main(["pack", str(copy), "-o", str(cache)]) == 0
    assert "already" in capsys.readouterr().out
    with GGUFFile.open(copy) as file:
        found = PackedFile.open(cache_path(file, cache), file)
    assert found is not None and len(found.entries) > 30
    found.close()
    assert torch.equal(logits(copy, cache), expected)
    assert main(["pack", str(copy)]) == 2 and "-o DIR" in capsys.readouterr().err


def test_a_matrix_over_a_file_is_not_freed_by_the_kernels():
    memory = bytearray(4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    matrix = cpu.PackedMatrix.over(0, 1, 16, 64, address)
    assert matrix.nbytes == 4096 and matrix.address == address
    del matrix
    memory[0] = 1


CUT_SHORT = """
import os, sys
from hybrid.cli import run
from hybrid.cli.main import main
plain = run.print_stream
def cut_first(stream):
    (path,) = [os.path.join(sys.argv[2], name) for name in os.listdir(sys.argv[2])]
    os.truncate(path, 0)
    return plain(stream)
run.print_stream = cut_first
sys.exit(main(["run", "-m", sys.argv[1], "--packed-cache", sys.argv[2], "-n", "4", "-c", "64", "Once"]))
"""


def test_a_cache_cut_short_while_in_use_ends_the_command_with_a_line(copy, tmp_path):
    cache = tmp_path / "cache"
    assert main(["pack", str(copy), "-o", str(cache)]) == 0
    command = [sys.executable, "-P", "-c", CUT_SHORT, str(copy), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"hybrid: a file in {cache} was changed or cut short")
