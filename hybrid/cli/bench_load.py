"""`hybrid bench-load`: how long loading takes, beside plainly reading the file."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.progress import status_line
from hybrid.cli.table import format_bytes

if TYPE_CHECKING:
    from hybrid.bench_load import LoadRow

HELP = "measure loading beside plainly reading the file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.flag(parser, "-r", "--repetitions", default=3)
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))
    arguments.flag(parser, "--packed-cache")
    arguments.flag(parser, "--backed")
    arguments.flag(parser, "-t", "--threads")
    arguments.flag(parser, "--isa")
    arguments.add_rules(parser)
    arguments.flag(parser, "--numa", default="auto")


def run(args: argparse.Namespace) -> int:
    rules = arguments.rules_for(args, args.model)

    from hybrid.bench_load import bench_load

    with status_line() as announce:
        rows = bench_load(
            args.model,
            rules,
            num_threads=args.threads,
            isa=args.isa,
            numa=args.numa,
            packed_cache=None if args.packed_cache is None else Path(args.packed_cache),
            backed=args.backed,
            repetitions=args.repetitions,
            announce=announce,
        )
    if args.output == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows)
    return 0


def _print_table(rows: list[LoadRow]) -> None:
    base = {row.what: row for row in rows}
    print(
        "| what                    |       size | seconds, median (least to most) |  GB/s |  of read | system s | user s | stolen s | peak over end | pages |"
    )
    print(
        "| ----------------------- | ---------: | ------------------------------: | ----: | -------: | -------: | -----: | -------: | ------------: | ----- |"
    )
    for row in rows:
        share = f"{row.rate / base[row.of].rate:.0%}" if row.of else ""
        seconds = f"{row.median_s:.2f} ({min(row.seconds):.2f} to {max(row.seconds):.2f})"
        peak = format_bytes(max(row.peak_bytes)) if row.notes else ""
        print(
            f"| {row.what:<23} | {format_bytes(row.n_bytes):>10} | {seconds:>31} | {row.rate / 1e9:>5.2f} "
            f"| {share:>8} | {max(row.system_s):>8.1f} | {max(row.user_s):>6.1f} | {max(row.stolen_s):>8.1f} | {peak:>13} "
            f"| {row.notes[-1] if row.notes else ''} |"
        )
