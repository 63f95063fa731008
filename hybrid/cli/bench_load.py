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
_WIDTHS = (-23, 10, 23, 5, 7, 8, 6, 8, 13, -16)  # of the table's columns; negative: text


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
    _print_row(
        "what", "size", "seconds (least to most)", "GB/s", "of read", "system s", "user s", "stolen s",
        "peak over end", "pages",
    )  # fmt: skip
    print("|" + "|".join(f" {'-' * (abs(width) - 1)}{'-' if width < 0 else ':'} " for width in _WIDTHS) + "|")
    for row in rows:
        _print_row(
            row.what,
            format_bytes(row.n_bytes),
            f"{row.median_s:.2f} ({min(row.seconds):.2f} to {max(row.seconds):.2f})",
            f"{row.rate / 1e9:.2f}",
            f"{row.rate / base[row.of].rate:.0%}" if row.of else "",
            *(f"{max(samples):.1f}" for samples in (row.system_s, row.user_s, row.stolen_s)),
            format_bytes(max(row.peak_bytes)) if row.notes else "",
            row.notes[-1] if row.notes else "",
        )


def _print_row(*cells: str) -> None:
    padded = (
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, width in zip(cells, _WIDTHS, strict=True)
    )
    print(f"| {' | '.join(padded)} |")
