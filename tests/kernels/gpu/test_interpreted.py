"""The interpreter's tests, in processes of their own: kernels are decorated for it or for a device, once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hybrid.kernels.gpu.registry import OPS


@pytest.mark.timeout(600)  # 45 s of work; other processes may share the cores
def test_every_operation_passes_in_the_interpreter():
    folder = Path(__file__).parent
    files = sorted(str(path) for path in folder.glob("interpreted*.py"))
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "--import-mode=importlib",
            "-q",
            "-p",
            "no:cacheprovider",
            *files,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= sum(len(op.test_shapes) for op in OPS.values() if op.interpreted), done.stdout[
        -500:
    ]
