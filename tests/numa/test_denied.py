"""A container that forbids mbind and move_pages, as Docker does by default: weights are where they are first
written, and nothing is called local that was not seen to be."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# A seccomp filter (BPF: code, jump if equal, jump if not, value) that answers EPERM to the two system calls.
DENIED = """
import ctypes, errno, struct
MBIND, MOVE_PAGES = 237, 279
steps = [(0x20, 0, 0, 0), (0x15, 2, 0, MBIND), (0x15, 1, 0, MOVE_PAGES), (0x06, 0, 0, 0x7FFF0000),
         (0x06, 0, 0, 0x00050000 | errno.EPERM)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
"""

MATRIX = """
import json
import numpy as np
from hybrid.kernels import cpu
from hybrid.backends.locality import locality_of
node = next(n["node"] for n in cpu.numa_nodes() if n["cpus"])
matrix = cpu.PackedMatrix(0, 1, 1024, 1024, "none", [node])
rows = np.ones((1024, 1024), np.float32)
matrix.pack_rows(cpu.ThreadPool(1), 0, 0, 1024, rows.ctypes.data)
found = locality_of([matrix])
print(json.dumps([matrix.parts[0]["problem"], found.share, found.method, found.warning, str(found)]))
"""

MODEL = """
import json, logging
from hybrid import LLM, SamplingParams
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("hybrid").addHandler(handler)
with LLM("demo", max_model_len=64, num_threads=2, numa="replicate") as llm:
    greedy = SamplingParams(temperature=0, max_tokens=6)
    tokens = list(llm.generate("Once upon a time", greedy, use_tqdm=False)[0].outputs[0].token_ids)
    print(json.dumps([tokens, llm.describe(), lines]))
"""


def run(script: str) -> list[object]:
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_matrix_says_why_it_is_not_bound() -> None:
    problem, share, method, warning, text = run(DENIED + MATRIX)
    assert str(problem).startswith("mbind: ") and "SYS_NICE" in str(problem)
    if method == "numa_maps":  # the one mapping is all on one node, as this file tells
        assert share is not None
    else:
        assert (share, method, text) == (None, "", "unverified")
        assert "UNVERIFIED: mbind: " in str(warning) and "move_pages: " in str(warning)


@pytest.mark.numa
def test_a_model_still_runs_and_is_not_called_local(nodes: list[int]) -> None:
    expected, _, silent = run(MODEL)
    tokens, line, lines = run(DENIED + MODEL)
    assert tokens == expected and not silent
    assert "unverified" in str(line) or "by numa_maps" in str(line)
    assert "100% local" not in str(line)
    assert any("mbind: " in str(entry) for entry in lines if isinstance(lines, list))
