"""`hybrid bench-serve`: load a server and measure it."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from hybrid.cli import arguments
from hybrid.cli.table import markdown_table
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.bench_serve.client import Sample
    from hybrid.bench_serve.memory import ProcessSample
    from hybrid.bench_serve.options import LoadOptions

HELP = "load a running server: time to first token, between tokens, throughput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.flag(parser, "--url", default="http://127.0.0.1:8000")
    arguments.flag(parser, "--clients", default=8)
    arguments.flag(parser, "--requests", default=64)
    arguments.flag(parser, "--duration")
    arguments.flag(parser, "--rate")
    arguments.flag(parser, "-p", "--prompt-tokens", default="128")
    arguments.flag(parser, "-n", "--output-tokens", default="64")
    arguments.flag(parser, "--shared-prefix", default=0)
    arguments.flag(parser, "--request-timeout", default=600.0)
    arguments.flag(parser, "-s", "--seed", default=0)
    arguments.flag(parser, "--api-key")
    arguments.flag(parser, "--allow-remote")
    arguments.flag(parser, "--long-prompt")
    arguments.flag(parser, "--watch")
    arguments.flag(parser, "--watch-interval", default=10.0)
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    options = load_options(args)
    from hybrid.bench_serve.client import check_loopback

    if not args.allow_remote:
        check_loopback(options.url)
    if args.long_prompt is not None:
        return _run_beside(options, args)
    summary = asyncio.run(_measure(options, args))
    print(json.dumps(summary, indent=2) if args.output == "json" else table(summary))
    if summary["errors"]:
        print(f"hybrid: not answered: {summary['errors']}", file=sys.stderr)
    return 0 if summary["answered"] else 1


def _run_beside(options: LoadOptions, args: argparse.Namespace) -> int:
    """A long prompt beside running streams."""
    from hybrid.bench_serve.beside import measure_beside

    found = asyncio.run(measure_beside(options, args.long_prompt))
    if args.output == "json":
        print(json.dumps(found, indent=2))
        return 0
    largest = ", ".join(f"{gap:.0f}" for gap in found["largest_gaps_ms"])
    gaps = found["gap_ms"]
    print(
        f"{found['streams']} streams alone: a token every {found['usual_gap_ms']:.1f} ms (median; largest "
        f"{found['usual_largest_gap_ms']:.1f})\n"
        f"beside a prompt of {found['long_prompt']} tokens, {found['gaps']} gaps: p50 {gaps['p50']:.1f}, p90 "
        f"{gaps['p90']:.1f}, p99 {gaps['p99']:.1f} ms; largest {largest} ms\n"
        f"largest gap: {found['largest_to_usual']:.2f} x the median alone, {found['largest_to_median']:.2f} "
        f"x the median beside the prompt\n"
        f"prompt: {found['alone_tokens_per_second']:.1f} tokens/s alone, "
        f"{found['beside_tokens_per_second']:.1f} beside the streams: {found['prefill_share']:.1%}"
    )
    return 0


async def _measure(options: LoadOptions, args: argparse.Namespace) -> dict[str, Any]:
    """Send the requests behind a progress bar, and watch a process meanwhile if one is named."""
    from tqdm import tqdm

    from hybrid.bench_serve import memory
    from hybrid.bench_serve.load import measure

    total = None if options.duration_s is not None else options.num_requests
    looks: list[ProcessSample] = []
    if args.watch is not None:
        memory.look(args.watch)
    with tqdm(total=total, unit="request", leave=False, disable=None) as bar:

        def show(sample: Sample) -> None:
            bar.update()

        watcher = None
        if args.watch is not None:
            watcher = asyncio.create_task(memory.watch(args.watch, args.watch_interval, looks))
        try:
            result = await measure(options, show)
        finally:
            if watcher is not None:
                watcher.cancel()
    return {**result.summary(), "process": memory.report(looks) if looks else None}


def load_options(args: argparse.Namespace) -> LoadOptions:
    """What the flags say.

    Raises:
        ConfigError: a length is malformed, or h11 is not installed.
    """
    try:
        import h11  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError("this needs the package h11: pip install 'hybrid-moe[server]'") from None
    from hybrid.bench_serve.options import Lengths, LoadOptions

    return LoadOptions(
        url=args.url,
        num_clients=args.clients,
        num_requests=args.requests,
        duration_s=args.duration,
        rate=args.rate,
        prompt_tokens=Lengths(args.prompt_tokens),
        output_tokens=Lengths(args.output_tokens),
        shared_prefix=args.shared_prefix,
        request_timeout_s=args.request_timeout,
        seed=args.seed,
        api_key=args.api_key,
    )


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    counts = (
        f"{summary['answered']} of {summary['requests']} requests answered in {summary['duration_s']:.1f} s, "
        f"{summary['clients']} clients: {summary['requests_per_second']:.2f} requests/s, "
        f"prompt {summary['prompt_tokens_per_second']:.1f} tokens/s "
        f"({summary['cached_tokens']} of {summary['prompt_tokens']} cached), "
        f"output {summary['output_tokens_per_second']:.1f} tokens/s"
    )
    rows, header = [], ["ms", "mean", "p50", "p90", "p99"]
    for name, key in (
        ("first token", "ttft_ms"),
        ("between tokens", "inter_token_ms"),
        ("total", "total_ms"),
    ):
        values = summary[key]
        if values is not None:
            rows.append([name, *(f"{value:.1f}" for value in values.values())])
    found = f"{counts}\n\n{markdown_table(header, rows, right=header[1:])}"
    return found if summary["process"] is None else f"{found}\n\n{_process(summary['process'])}"


def _process(report: dict[str, Any]) -> str:
    (resident, resident_end), (files, files_end), (threads, threads_end) = (
        report[name] for name in ("resident_mib", "descriptors", "threads")
    )
    line = (
        f"process, {report['samples']} looks in {report['seconds']:.0f} s: resident {resident:.1f} -> "
        f"{resident_end:.1f} MiB (largest {report['largest_mib']:.1f}), descriptors {files} -> {files_end}, "
        f"threads {threads} -> {threads_end}"
    )
    if report["slope_kib_per_minute"] is None:
        return line
    found, error = report["slope_kib_per_minute"], report["slope_error_kib_per_minute"]
    return f"{line}\nslope of the resident memory: {found:+.2f} ± {error:.2f} KiB a minute (standard error)"
