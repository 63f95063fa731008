"""`hybrid doctor`: machines shown to it as folders, and the one it runs on."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hybrid.kernels import cpu

from hybrid import calibration, doctor
from hybrid.cli import arguments
from hybrid.cli import doctor as command
from hybrid.errors import ConfigError
from hybrid.free_memory import available_memory, cgroup_memory_limit
from hybrid.gguf import GGMLType


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(arguments.resolve(parser.parse_args(argv)))


def test_numa_nodes_in_numeric_order(tmp_path: Path) -> None:
    nodes = "sys/devices/system/node"
    root = machine(
        tmp_path,
        {
            f"{nodes}/node{n}/cpulist": f"{n}-{n + 1}\n"
            for n in (0, 2, 10)
        }
        | {f"{nodes}/node10/meminfo": "Node 10 MemTotal:  2048 kB\nNode 10 MemFree:   1024 kB\n"}
        | {f"{nodes}/possible": "0-10\n"},
    )  # fmt: skip
    found = doctor.numa_nodes(root)
    assert [node.node for node in found] == [0, 2, 10]
    assert found[2] == doctor.NumaNode(10, "10-11", 2048 << 10, 1024 << 10)


def test_huge_pages(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "512\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "100\n",
            "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages": "0\n",
            "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages": "0\n",
        },
    )
    found = doctor.huge_pages(root)
    assert found.transparent == "madvise"
    assert found.reserved == {"1048576kB": (0, 0), "2048kB": (512, 100)}


def test_bare_machine_is_described_without_error(tmp_path: Path) -> None:
    assert doctor.numa_nodes(tmp_path) == []
    assert doctor.huge_pages(tmp_path) == doctor.HugePages("unavailable", {})
    assert doctor.memory(tmp_path).total_bytes == 0
    assert doctor.last_level_cache_bytes(tmp_path) == 0
    assert doctor.cores(tmp_path).logical >= 1


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "3000\n",
                "sys/fs/cgroup/a/memory.max": "2000\n",
            },
            2000,
        ),
        # Inside a container the group is the root.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "777\n"}, 777),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1234\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            1234,
        ),
    ],
)
def test_smallest_cgroup_limit_counts(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert cgroup_memory_limit(machine(tmp_path, files)) == limit


MEMINFO = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8 kB\n", "proc/self/cgroup": "0::/a/b\n"}
GROUP = "sys/fs/cgroup/a"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        (MEMINFO, 8192),
        (MEMINFO | {f"{GROUP}/memory.max": "5000\n", f"{GROUP}/memory.current": "1000\n"}, 4000),
        (
            MEMINFO
            | {f"{GROUP}/memory.max": "5000\n", f"{GROUP}/memory.current": "4000\n"}
            | {f"{GROUP}/memory.stat": "anon 1\ninactive_file 2500\n"},
            3500,
        ),
        (MEMINFO | {f"{GROUP}/memory.max": "5000\n", f"{GROUP}/memory.current": "6000\n"}, 0),
        (MEMINFO | {f"{GROUP}/memory.max": "90000\n", f"{GROUP}/memory.current": "1000\n"}, 8192),
        ({"proc/self/cgroup": "0::/a\n", f"{GROUP}/memory.max": "70\n"}, 70),
    ],
)
def test_memory_that_may_be_taken(tmp_path: Path, files: dict[str, str], available: int | None) -> None:
    assert available_memory(machine(tmp_path, files)) == available


def test_memory_sizes(tmp_path: Path) -> None:
    root = machine(
        tmp_path, {"proc/meminfo": "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 60 kB\nSwapTotal: 8 kB\n"}
    )
    found = doctor.memory(root)
    assert (found.total_bytes, found.available_bytes, found.swap_bytes) == (102400, 61440, 8192)


def test_last_level_caches_shared_by_cores_count_once(tmp_path: Path) -> None:
    base = "sys/devices/system/cpu"
    files = {}
    for number, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        files[f"{base}/cpu{number}/cache/index3/size"] = "1024K\n"
        files[f"{base}/cpu{number}/cache/index3/shared_cpu_list"] = f"{shared}\n"
    assert doctor.last_level_cache_bytes(machine(tmp_path, files)) == 2 << 20


def test_no_driver_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.gpus(tmp_path) == ([], "no NVIDIA driver: models run on the CPU")


def test_driver_without_answer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\n"
    root = machine(tmp_path, {"proc/driver/nvidia/version": line})

    def fail(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 5)

    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert doctor.gpus(root) == (
        [],
        "driver 550.54.14 is loaded, but nvidia-smi does not answer (TimeoutExpired)",
    )


def test_gpu_line() -> None:
    gpu = doctor.parse_gpu("NVIDIA GeForce RTX 3090, 24576, 550.54.14, 8.6, 4, 16")
    assert gpu == doctor.Gpu("NVIDIA GeForce RTX 3090", 24 << 30, "550.54.14", "8.6", "4.0 x16")


def test_isa_choice_is_the_best_supported_one() -> None:
    choice = doctor.isa_choice()
    assert choice.chosen == choice.supported[-1] == cpu.current_isa()
    assert set(choice.supported) | set(choice.missing) == set(cpu.isas())
    assert not set(choice.supported) & set(choice.missing)
    for flags in choice.missing.values():
        assert flags and not set(flags) & set(choice.features)


def test_unknown_isa() -> None:
    with pytest.raises(ConfigError, match=r"sse9.*--isa"):
        run("--isa", "sse9")


def test_forced_isa() -> None:
    try:
        assert doctor.isa_choice("scalar").chosen == "scalar"
    finally:
        cpu.select_isa(None)


def test_json_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_MEASURE_SECONDS", 0.05)
    assert run("-o", "json", "-t", "1") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found.keys() == {
        "cores", "isa", "numa_nodes", "numa_binding", "huge_pages", "memory", "bandwidth", "rates", "gpus",
        "gpu_driver", "torch_cuda", "versions", "platform", "load_average", "rates_kept_in",
    }  # fmt: skip
    assert (
        found["cores"]["allowed"] == len(os.sched_getaffinity(0)) >= found["cores"]["physical_allowed"] >= 1
    )
    assert found["bandwidth"]["threads"] == 1
    weight_s = found["rates"]["weight_s"]
    assert {"Q4_K", "Q8_0"} <= weight_s.keys()
    for points in weight_s.values():
        assert points.keys() == {str(tokens) for tokens in calibration.TOKENS}
        assert min(points.values()) > 0
    kept = calibration.read_rates(1, found["isa"]["chosen"])
    assert kept is not None and json.loads(json.dumps(asdict(kept))) == found["rates"]
    assert found["bandwidth"]["all_threads"] >= found["bandwidth"]["one_thread"] > 1e8
    assert found["versions"]["hybrid-moe"][0].isdigit()
    assert captured.err == ""


def test_seconds_of_weights_are_of_one_weight_and_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(step: Callable[[int], None], *, least: int) -> float:
        step(0)
        return float(calibration._ROWS * calibration._COLS)

    monkeypatch.setattr(calibration, "_median_seconds", seconds)
    found = calibration.measure_weights(cpu.ThreadPool(1), GGMLType.Q8_0)
    assert found == dict.fromkeys(calibration.TOKENS, 1.0)


def test_table_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_MEASURE_SECONDS", 0.05)
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    monkeypatch.setattr(calibration, "_SECONDS", 0.01)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run() == 0
    out = capsys.readouterr().out
    assert "others were busy (load 1000.0 on" in out and "not kept: the cache folder takes no file" in out
    for title in ("cores", "isa", "numa", "memory", "bandwidth", "rates", "huge pages", "gpu", "versions"):
        assert f"\n{title} " in f"\n{out}"
    assert "GB/s read by" in out


def test_other_output_formats_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("-o", "csv")
    assert "expected md or json, found 'csv'" in capsys.readouterr().err
