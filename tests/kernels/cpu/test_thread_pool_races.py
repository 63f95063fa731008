"""The thread pool with threads stopped between any two of its steps, and under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "thread_pool"
SOURCES = Path(__file__).parents[3] / "kernels" / "cpu"


def build(folder: Path, *options: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "the kernels were built, so there is a C++ compiler: name it by CXX"
    program = folder / "stress"
    files = [HERE / "stress.cc", SOURCES / "thread_pool.cc", SOURCES / "topology.cc"]
    subprocess.run(
        [
            *compiler.split(),
            "-std=c++20",
            "-O1",
            "-g",
            *options,
            f"-I{SOURCES}",
            *files,
            "-o",
            program,
            "-pthread",
        ],
        check=True,
    )
    return program


def run(command: list[str | Path]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def shaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("shaken"), f'-DHYBRID_ATOMICS="{HERE / "shaken_atomics.h"}"')


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_any_interleaving_ends(shaken: Path, threads: int) -> None:
    assert int(run([shaken, str(threads), "2"]).split()[0]) > 100


def test_no_data_race(tmp_path: Path) -> None:
    program = build(tmp_path, "-fsanitize=thread")
    # ThreadSanitizer cannot map its shadow where the kernel places programs too randomly.
    assert int(run(["setarch", "-R", program, "3", "3"]).split()[0]) > 10
