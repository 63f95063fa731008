"""`hybrid doctor`: what this machine offers, with its measured memory bandwidth."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hybrid.cli import arguments
from hybrid.cli.progress import status_line
from hybrid.cli.table import format_bytes

_BUSY = 0.5  # processes that run or wait for each CPU, from where on figures suffer

HELP = "show this machine's cores, instruction set, memory speed and GPUs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.flag(parser, "-t", "--threads")
    arguments.flag(parser, "--isa")
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    from hybrid.doctor import examine

    with status_line() as announce:
        found = examine(isa=args.isa, num_threads=args.threads, announce=announce)
    if args.output == "json":
        print(json.dumps(found, indent=2))
    else:
        for title, lines in _sections(found):
            print(f"{title:<12}{lines[0]}")
            for line in lines[1:]:
                print(f"{'':<12}{line}")
    return 0


def _sections(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        ("cores", _core_lines(found["cores"])),
        ("isa", _isa_lines(found["isa"])),
        ("numa", [*_numa_lines(found["numa_nodes"]), _binding_line(found["numa_binding"])]),
        ("memory", _memory_lines(found["memory"])),
        ("bandwidth", _bandwidth_lines(found)),
        ("rates", _rate_lines(found["rates"], found["rates_kept_in"])),
        ("huge pages", _huge_page_lines(found["huge_pages"])),
        ("gpu", _gpu_lines(found)),
        ("versions", [", ".join(f"{name} {version}" for name, version in found["versions"].items())]),
    ]


def _core_lines(cores: dict[str, Any]) -> list[str]:
    usable = f"this process may use {cores['allowed']} ({cores['allowed_list']})"
    physical = f"on {cores['physical_allowed']} physical cores"
    return [cores["model"], f"{cores['logical']} logical CPUs; {usable}, {physical}"]


def _isa_lines(isa: dict[str, Any]) -> list[str]:
    lines = [f"{isa['chosen']}: {isa['reason']} (supported: {', '.join(isa['supported'])})"]
    lines += [f"{name} would need {', '.join(flags)}" for name, flags in isa["missing"].items()]
    return lines


def _numa_lines(nodes: list[dict[str, Any]]) -> list[str]:
    if not nodes:
        return ["the system shows no nodes"]
    lines = []
    for node in nodes:
        total, free = format_bytes(node["total_bytes"]), format_bytes(node["free_bytes"])
        lines.append(f"node {node['node']}: CPUs {node['cpus']}, {total}, {free} free")
    return lines


def _binding_line(binding: dict[str, Any]) -> str:
    because = f": {binding['problem']}" if binding["problem"] else ""
    if binding["local_share"] is None:
        return f"whether memory is where it is bound to cannot be verified{because}"
    if binding["local_share"] < 1:
        share = f"{binding['local_share']:.0%}"
        return f"of memory bound to a node {share} is there (by {binding['method']}){because}"
    return f"memory can be bound to nodes (verified by {binding['method']}){because}"


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    total, available = format_bytes(memory["total_bytes"]), format_bytes(memory["available_bytes"])
    lines = [
        f"{total}, {available} available, {format_bytes(memory['swap_bytes'])} swap, "
        f"overcommit {memory['overcommit']}"
    ]
    if memory["cgroup_limit_bytes"] is not None:
        lines.append(f"limited to {format_bytes(memory['cgroup_limit_bytes'])} by the control group")
    if memory["locked_limit_bytes"] is not None:
        lines.append(f"at most {format_bytes(memory['locked_limit_bytes'])} may be locked (ulimit -l)")
    return lines


def _bandwidth_lines(found: dict[str, Any]) -> list[str]:
    bandwidth, load, num_cpus = found["bandwidth"], found["load_average"], found["cores"]["allowed"]
    one, every = bandwidth["one_thread"] / 1e9, bandwidth["all_threads"] / 1e9
    lines = [f"{every:.1f} GB/s read by {bandwidth['threads']} threads, {one:.1f} GB/s by one (measured)"]
    if load > _BUSY * num_cpus:
        lines.append(
            f"others were busy (load {load:.1f} on {num_cpus} CPUs): measure again when they are not"
        )
    return lines


def _rate_lines(rates: dict[str, Any], kept_in: str | None) -> list[str]:
    kept = f"kept in {kept_in} for `hybrid plan`" if kept_in else "not kept: the cache folder takes no file"
    lines = [f"{kept}; products of 1024 x 4096 weights, in 10^9 multiply-adds a second:"]
    for name, points in rates["weight_s"].items():
        speeds = ", ".join(
            f"{tokens / seconds / 1e9:.1f} with {tokens}" for tokens, seconds in points.items()
        )
        lines.append(f"{name}: {speeds} tokens")
    lines.append(f"attention: {rates['attention_macs'] / 1e9:.1f} of float32")
    return lines


def _huge_page_lines(pages: dict[str, Any]) -> list[str]:
    lines = [f"transparent: {pages['transparent']}"]
    lines += [
        f"reserved {size}: {count}, {free} free" for size, (count, free) in pages["reserved"].items() if count
    ]
    return lines


def _gpu_lines(found: dict[str, Any]) -> list[str]:
    lines = [found["gpu_driver"]]
    for gpu in found["gpus"]:
        size = "?" if gpu["memory_bytes"] is None else format_bytes(gpu["memory_bytes"])
        lines.append(
            f"{gpu['name']}: {size}, sm_{gpu['compute_capability'].replace('.', '')}, PCIe {gpu['pcie']}"
        )
    cuda = found["torch_cuda"]
    if cuda is not None and not cuda["available"]:
        lines.append(f"torch (built for CUDA {cuda['built_for']}) cannot use them")
    return lines
