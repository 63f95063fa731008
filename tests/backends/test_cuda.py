"""The GPU backend's tests, in processes of their own: kernels are decorated for Triton's interpreter or for a
device, once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
FILES = ("backends/interpreted_cuda.py", "models/interpreted_gpu.py")


def run(file: str, **environment: str) -> int:
    """Tests of a file that passed; none may fail."""
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-P",
                "-m",
                "pytest",
                "--import-mode=importlib",
                "-q",
                "-p",
                "no:cacheprovider",
            ),
            str(TESTS / file),
        ],
        env={**os.environ, **environment},
        cwd=(TESTS / file).parent,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    return int(passed[1])


@pytest.mark.timeout(600)  # half a minute of work; other processes may share the cores
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    assert run(file, TRITON_INTERPRET="1", TRITON_DEFAULT_FP_FUSION="1") >= 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", FILES)
def test_on_a_gpu(file):
    assert run(file, HYBRID_CUDA_DEVICES="0,0") >= 8
