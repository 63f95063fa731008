"""Reading ahead: the right bytes in the right order, past the page cache or not, and an end at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import GGUFError
from hybrid.gguf import GGMLType, GGUFFile, GGUFWriter, read_ahead
from hybrid.gguf.read_ahead import ReadAhead
from hybrid.gguf.reader import Range


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Tensors that end anywhere in a page, the last with the file."""
    path = tmp_path_factory.mktemp("read") / "some.gguf"
    rng = np.random.default_rng(0)
    counts = (1, 1000, 5000, 70_000, 3)
    with GGUFWriter(path) as writer:
        writer.add_metadata("general.architecture", "deepseek2")
        for index, count in enumerate(counts):
            writer.add_tensor(f"t{index}", (count,), GGMLType.F32)
        for index, count in enumerate(counts):
            writer.write_tensor(f"t{index}", rng.standard_normal(count).astype(np.float32).tobytes())
    return path


def ranges(file, step=10_000):
    return [
        Range(info.name, offset, min(step, info.n_bytes - offset))
        for info in file.tensors.values()
        for offset in range(0, info.n_bytes, step)
    ]


def requests(file):
    return [file.request(entry) for entry in ranges(file)]


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hybrid-read")]


@pytest.mark.parametrize("direct", [True, False])
def test_ranges_come_in_order(path, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(read_ahead, "open_direct", lambda fd: None)
    with GGUFFile.open(path) as file, ReadAhead(requests(file)) as reader:
        assert direct or not reader.bypasses_cache  # else the file system decides
        for entry in ranges(file):
            wanted = file.data(entry.tensor)[entry.offset : entry.offset + entry.n_bytes]
            assert bytes(reader.next()) == bytes(wanted)
    assert not readers()


def test_it_may_be_left_at_any_moment(path):
    with GGUFFile.open(path) as file:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for taken in (0, 1, 7):
            with ReadAhead(requests(file)) as reader:
                for _ in range(taken):
                    reader.next()
            assert not readers() and len(list(Path("/proc/self/fd").iterdir())) == before
        with ReadAhead([]):
            pass


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_cut_short_is_told(path, tmp_path, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(read_ahead, "open_direct", lambda fd: None)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    with GGUFFile.open(copy) as file:
        os.truncate(copy, copy.stat().st_size - 5000)
        with ReadAhead(requests(file)) as reader, pytest.raises(GGUFError, match="changed since"):
            for _ in ranges(file):
                reader.next()
    assert not readers()


def test_a_disk_error_names_the_tensor(path, monkeypatch):
    def fail(fd, view, offset, wanted):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(read_ahead, "_read_until", fail)
    with (
        GGUFFile.open(path) as file,
        ReadAhead(requests(file)) as reader,
        pytest.raises(GGUFError, match=r"'t0'.*cannot read the file: Input/output error"),
    ):
        reader.next()


INTERRUPTED = """
import os, signal, threading, time
from hybrid.gguf import read_ahead
plain = read_ahead._read_until
read_ahead._read_until = lambda *args: (time.sleep(0.2), plain(*args))[1]  # a slow disk
from hybrid import LLM

def interrupt():
    global sent
    while not any(thread.name.startswith("hybrid-read") for thread in threading.enumerate()):
        time.sleep(0.01)
    time.sleep(0.1)
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    LLM("demo", max_model_len=64)
except KeyboardInterrupt:
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("hybrid")]
    print(time.monotonic() - sent, left)
"""


def test_interrupt_ends_loading_within_a_second():
    command = [sys.executable, "-P", "-c", INTERRUPTED]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    seconds, left = found.split(" ", 1)
    assert float(seconds) < 1 and left == "[]\n"
