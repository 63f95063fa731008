"""`hybrid bench-load`: every step is timed, the whole file is read, and nothing is left behind."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from hybrid import bench_load
from hybrid.cli.main import main
from hybrid.config import model_path

STEPS = ["read", "read to new memory", "load"]
OF_CACHE = ["read packed cache", "start from packed cache", "again, in page cache"]


def test_rows(capsys, tmp_path):
    assert main(["bench-load", "-r", "2", "--backed", "--packed-cache", str(tmp_path), "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in rows] == STEPS + OF_CACHE
    (cache,) = tmp_path.iterdir()
    for row in rows:
        size = cache.stat().st_size if row["what"] in OF_CACHE else model_path("demo").stat().st_size
        assert row["n_bytes"] == size
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert len(row["notes"]) == (0 if "read" in row["what"] else 2)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("hybrid-")]
    assert not [name for name in left if "read" in name or "map" in name]


def test_table(capsys):
    assert main(["bench-load", "-r", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == STEPS
    assert len({len(line) for line in lines[:3]}) == 1


def test_a_plain_read_reads_everything(tmp_path: Path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths, 1):
        path.write_bytes(bytes([number]) * (bench_load.PIECE_BYTES + 5000))
    memory = bench_load._new_memory(sum(path.stat().st_size + bench_load.PIECE_BYTES for path in paths))
    bench_load.read_plainly(paths, memory)
    content = bytes(memory)
    assert (content.count(1), content.count(2)) == (bench_load.PIECE_BYTES + 5000,) * 2
