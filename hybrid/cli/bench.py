"""`hybrid bench`: tokens per second, as llama-bench's table."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hybrid.cli import arguments
from hybrid.cli.progress import status_line
from hybrid.cli.table import format_bytes, format_count

HELP = "measure prompt processing and generation speed"

_DEFAULT_UBATCH = 512
# Column -> its width, negative for text, in the Markdown table; columns after `backend` that say nothing
# beyond the defaults are left out.
_WIDTHS = {
    "model": -30,
    "size": 10,
    "params": 10,
    "backend": -10,
    "threads": 7,
    "isa": -10,
    "ub": 5,
    "ctk": -5,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.flag(parser, "-p", "--n-prompt", default=(512,), action=arguments.Extend)
    arguments.flag(parser, "-n", "--n-gen", default=(128,), action=arguments.Extend)
    arguments.flag(parser, "-d", "--n-depth", default=(0,), action=arguments.Extend)
    arguments.flag(parser, "-r", "--repetitions", default=5)
    arguments.flag(parser, "-ub", "--ubatch-size", default=_DEFAULT_UBATCH)
    arguments.flag(parser, "-o", "--output", default="md", choices=tuple(_PRINTERS))
    group = parser.add_argument_group("machine")
    arguments.flag(group, "-ctk", "--cache-type-k", "--kv-format")
    arguments.flag(group, "-t", "--threads")
    arguments.flag(group, "--isa")
    arguments.add_rules(group)
    arguments.flag(group, "--numa", default="auto")
    arguments.flag(group, "--packed-cache")
    arguments.add_experts(group)


def run(args: argparse.Namespace) -> int:
    from hybrid.bench import list_tests, prepare, run_tests
    from hybrid.engine.load import LoadOptions

    tests = list_tests(args.n_prompt, args.n_gen, args.n_depth)
    options = LoadOptions(
        rules=arguments.rules_for(args, args.model),
        num_threads=args.threads,
        isa=args.isa,
        kv_format=args.kv_format,
        max_num_batched_tokens=args.ubatch_size,
        experts_per_token=args.experts_per_token,
        expert_threshold=args.expert_threshold,
        numa=args.numa,
        packed_cache=args.packed_cache,
    )
    arguments.end_on_bus_error(args)
    with status_line() as announce:

        def progress(done: int, total: int) -> None:
            announce(f"loading: {format_bytes(done)} of {format_bytes(total)}")

        with prepare(args.model, options, tests, progress=progress, announce=announce) as (sequence, setup):
            rows = run_tests(sequence, tests, setup, repetitions=args.repetitions, announce=announce)
            _PRINTERS[args.output](_cleared(rows, announce), args)
    return 0


def _cleared(rows: Iterator[dict[str, Any]], announce: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Takes the status line away before a row is printed."""
    for row in rows:
        announce("")
        yield row


def _print_json(rows: Iterator[dict[str, Any]], _: argparse.Namespace) -> None:
    print(json.dumps(list(rows), indent=2))


def _print_jsonl(rows: Iterator[dict[str, Any]], _: argparse.Namespace) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


def _print_csv(rows: Iterator[dict[str, Any]], _: argparse.Namespace) -> None:
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row | {"samples_ts": json.dumps(row["samples_ts"])})
        sys.stdout.flush()


def _print_markdown(rows: Iterator[dict[str, Any]], args: argparse.Namespace) -> None:
    columns = ["model", "size", "params", "backend", "threads"]
    columns += ["isa"] if args.isa is not None else []
    columns += ["ub"] if args.ubatch_size != _DEFAULT_UBATCH else []
    done: list[dict[str, Any]] = []
    for row in rows:
        if not done:
            columns += ["ctk"] if row["type_k"] != "f16" else []
            widths = {name: _WIDTHS[name] for name in columns} | {"test": 15, "t/s": 20}
            print(_line({name: name for name in widths}, widths))
            print("|" + "|".join(_rule(width) for width in widths.values()) + "|")
        print(_line(_cells(row), widths), flush=True)
        done.append(row)
    _print_footer(done)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model_type"],
        "size": format_bytes(row["model_size"]),
        "params": format_count(row["model_n_params"]),
        "backend": row["backends"],
        "threads": str(row["n_threads"]),
        "isa": row["isa"],
        "ub": str(row["n_ubatch"]),
        "ctk": row["type_k"],
        "test": row["test"],
        "t/s": f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
    }


def _line(cells: dict[str, str], widths: dict[str, int]) -> str:
    padded = (
        cells[name].ljust(-width) if width < 0 else cells[name].rjust(width) for name, width in widths.items()
    )
    return f"| {' | '.join(padded)} |"


def _locality(row: dict[str, Any]) -> str:
    """How many of the pages with a NUMA node of their own are there."""
    if row["numa_local"] is not None:
        return f" ({row['numa_local']:.1%} of pages local)"
    return " (UNVERIFIED)" if row["numa_verified"] is False else ""


def _rule(width: int) -> str:
    dashes = "-" * (abs(width) - 1)
    return f" {dashes}- " if width < 0 else f" {dashes}: "


def _print_footer(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    experts = (
        "" if first["experts_per_token"] is None else f" experts per token {first['experts_per_token']},"
    )
    if first["expert_threshold"]:
        experts += f" expert threshold {first['expert_threshold']:g},"
    numa = first["numa"] + _locality(first)
    print(
        f"\nisa {first['isa']}, {first['n_threads']} threads, numa {numa},{experts}"
        f" placement {first['placement_hash']}"
    )
    for row in rows:
        if row["limit_fraction"] is not None:
            reached, limit = row["limit_fraction"] * row["limit_value"] / 1e9, row["limit_value"] / 1e9
            share = f"{row['limit_fraction']:.0%}"
            print(f"{row['test']}: {reached:.1f} GB/s of {limit:.1f} GB/s read bandwidth, {share}")
        if row["predicted_ts"] is not None:
            error = row["predicted_ts"] / row["avg_ts"] - 1
            print(
                f"{row['test']}: predicted {row['predicted_ts']:.2f} tokens/s, "
                f"measured {row['avg_ts']:.2f} ({error:+.0%})"
            )


_PRINTERS = {"md": _print_markdown, "csv": _print_csv, "json": _print_json, "jsonl": _print_jsonl}
