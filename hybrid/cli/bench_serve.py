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
    from hybrid.bench_serve import LoadOptions, Sample

HELP = "load a running server: time to first token, between tokens, throughput"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.flag(parser, "--url", default="http://127.0.0.1:8000")
    arguments.flag(parser, "--clients", default=8)
    arguments.flag(parser, "--requests", default=64)
    arguments.flag(parser, "--rate")
    arguments.flag(parser, "-p", "--prompt-tokens", default="128")
    arguments.flag(parser, "-n", "--output-tokens", default="64")
    arguments.flag(parser, "--shared-prefix", default=0)
    arguments.flag(parser, "--request-timeout", default=600.0)
    arguments.flag(parser, "-s", "--seed", default=0)
    arguments.flag(parser, "--api-key")
    arguments.flag(parser, "--allow-remote")
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    options = load_options(args)
    from hybrid.bench_serve import check_loopback, measure

    if not args.allow_remote:
        check_loopback(options.url)
    from tqdm import tqdm

    with tqdm(total=options.num_requests, unit="request", leave=False, disable=None) as bar:

        def show(sample: Sample) -> None:
            bar.update()

        result = asyncio.run(measure(options, show))
    summary = result.summary()
    print(json.dumps(summary, indent=2) if args.output == "json" else table(summary))
    if summary["errors"]:
        print(f"hybrid: not answered: {summary['errors']}", file=sys.stderr)
    return 0 if summary["answered"] else 1


def load_options(args: argparse.Namespace) -> LoadOptions:
    """What the flags say.

    Raises:
        ConfigError: a length is malformed, or h11 is not installed.
    """
    try:
        from hybrid.bench_serve import Lengths, LoadOptions
    except ModuleNotFoundError as error:
        if error.name != "h11":
            raise
        raise ConfigError("this needs the package h11: pip install 'hybrid-moe[server]'") from None
    return LoadOptions(
        url=args.url,
        num_clients=args.clients,
        num_requests=args.requests,
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
    return f"{counts}\n\n{markdown_table(header, rows, right=header[1:])}"
