"""`hybrid bench-kernels`: kernels of an instruction set or of a GPU, checked, and timed beside the limits."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from hybrid.cli import arguments
from hybrid.cli.progress import status_line
from hybrid.errors import ConfigError

HELP = "check and time the kernels of every weight format, on the CPU or a GPU"
_HEADER = "| kernel | tokens | error | GB/s | TOPS | share of limit | GB/s in cache |"
_RULE = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "formats to take, and attention (default: all); on a GPU, parts of names"
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=formats)
    arguments.flag(parser, "--device", default="cpu", choices=("cpu", "cuda"))
    arguments.flag(parser, "-t", "--threads")
    arguments.flag(parser, "--isa")
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    return _run_gpu(args) if args.device == "cuda" else _run_cpu(args)


def _run_cpu(args: argparse.Namespace) -> int:
    import numpy as np

    from hybrid.backends.isa import select_isa
    from hybrid.gguf import GGMLType, random_blocks
    from hybrid.kernels import bench, bench_attention, cpu

    isa = select_isa(args.isa)
    known = [*sorted({row["format"] for row in cpu.kernel_rows()}), bench_attention.FORMAT]
    for name in args.formats:
        if name not in known:
            raise ConfigError(f"FORMAT: expected one of {', '.join(known)}, found {name!r}")
    cores = cpu.physical_cores()
    threads = args.threads or len(cores)
    pool = cpu.ThreadPool(threads, cores[:threads] if threads <= len(cores) else [])

    def random_rows(ggml_type: int, rows: int, cols: int) -> Any:
        return random_blocks(GGMLType(ggml_type), rows, cols, np.random.default_rng(0))

    results = []
    with status_line() as announce:
        announce("measuring the machine's limits")
        limits = bench.measure_limits(pool)
        formats = [name for name in args.formats if name != bench_attention.FORMAT]
        if formats or not args.formats:
            for result in bench.bench_kernels(pool, limits, random_rows, formats=formats):
                announce(f"{result.name}, {result.num_tokens} tokens")
                results.append(result)
        if len(formats) < len(args.formats) or not args.formats:
            announce("attention")
            results += bench_attention.bench_attention(pool, limits)
    if args.output == "json":
        print(json.dumps({"limits": asdict(limits), "results": [asdict(r) for r in results]}, indent=1))
        return 0
    print(f"{isa}, {threads} threads: RAM is read at {limits.read_bandwidth / 1e9:.1f} GB/s, ", end="")
    print(f"int8 products reach {limits.int8_rate / 1e12:.3f} TOPS\n\n{_HEADER}\n{_RULE}")
    for r in results:
        cached = "" if r.cached_bytes_s is None else f"{r.cached_bytes_s / 1e9:.1f}"
        print(
            f"| {r.name} | {r.num_tokens} | {r.error:.1e} | {r.bytes_s / 1e9:.1f} | {r.ops_s / 1e12:.3f} "
            f"| {r.limit_fraction:.0%} | {cached} |"
        )
    return 0


def _run_gpu(args: argparse.Namespace) -> int:
    from hybrid.kernels.gpu import bench

    try:
        device = bench.cuda_device()
    except RuntimeError as error:
        raise ConfigError(f"--device cuda: {error}; --device cpu measures this machine's processor") from None
    limits = bench.measure_limits(device)
    results = []
    with status_line() as announce:
        for result in bench.bench_ops(device, limits, args.formats):
            announce(f"{result.name}, {result.shape}")
            results.append(result)
    if args.output == "json":
        print(json.dumps({"limits": asdict(limits), "results": [asdict(r) for r in results]}, indent=1))
        return 0
    print(f"{limits.device}: copies at {limits.bandwidth / 1e9:.0f} GB/s, ", end="")
    print(f"torch multiplies bf16 at {limits.bf16_rate / 1e12:.1f} TFLOPS\n")
    print("| kernel | shape | share of the error allowed | µs | GB/s | TFLOPS | share of limit |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        print(
            f"| {r.name} | {r.shape} | {r.error:.0%} | {r.seconds * 1e6:.1f} | {r.bytes_s / 1e9:.0f} "
            f"| {r.ops_s / 1e12:.2f} | {r.limit_fraction:.0%} |"
        )
    return 0
