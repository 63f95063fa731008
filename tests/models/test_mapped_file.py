"""Reading a mapped file ahead: all of a range is there after waiting, and an end at any moment."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from hybrid.backends import mapped_file
from hybrid.backends.mapped_file import MappedFile
from hybrid.errors import GGUFError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes((40 << 20) + 123))
    return path


def mapped(path):
    with path.open("rb") as file:
        return MappedFile(path, file.fileno())


def resident_kib(mapping):
    text = Path("/proc/self/smaps").read_text()
    entry = text[text.index(f"{mapping.address:x}-") :]
    return int(entry[entry.index("Rss:") :].split()[1])


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hybrid-map")]


def test_ranges_are_there_after_waiting(path):
    mapping = mapped(path)
    ranges = [(0, 100), (4096, 20 << 20), (4096 + (20 << 20), (20 << 20) - 4096 + 123), (0, 0)]
    before = resident_kib(mapping)
    mapping.read_ahead(ranges)
    for index in range(len(ranges)):
        mapping.wait(index)
    assert before < 1 << 10 and resident_kib(mapping) >= 40 << 10
    mapping.stop()
    assert not threads()
    assert mapping._bytes.tobytes() == path.read_bytes()


def test_it_may_be_left_at_any_moment(path):
    mapping = mapped(path)
    mapping.read_ahead([(0, 40 << 20)])
    mapping.stop()
    assert not threads()
    mapped(path).stop()


def test_a_file_cut_short_is_told(path):
    mapping = mapped(path)
    os.truncate(path, 1 << 20)
    mapping.read_ahead([(0, 4096), (0, 40 << 20)])
    with pytest.raises(GGUFError, match=r"cannot read the cache of packed weights: Bad address.*start again"):
        mapping.wait(1)
    mapping.stop()


def test_kernels_that_cannot_be_asked_read_later(path, monkeypatch):
    monkeypatch.setattr(mapped_file.cpu, "read_mapped", lambda start, n_bytes: 22)
    mapping = mapped(path)
    mapping.read_ahead([(0, 40 << 20)])
    mapping.wait(0)
    mapping.stop()
