"""`hybrid pack MODEL`: keep packed weights, so that later starts need not pack them."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybrid.cli import arguments
from hybrid.cli.progress import byte_progress
from hybrid.cli.table import format_bytes
from hybrid.errors import ConfigError

HELP = "write packed weights to a folder, which --packed-cache then starts from"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="MODEL", help="a GGUF file (default: -m)")
    arguments.add_model(parser)
    arguments.flag(parser, "-o", "--packed-cache")
    arguments.flag(parser, "-t", "--threads")
    arguments.flag(parser, "--isa")
    arguments.add_rules(parser)


def run(args: argparse.Namespace) -> int:
    if args.packed_cache is None:
        raise ConfigError("pack needs the folder to write to: -o DIR (or HYBRID_PACKED_CACHE)")
    model = args.model if args.file is None else args.file
    rules = arguments.rules_for(args, model)

    from hybrid.backends.isa import select_isa
    from hybrid.config import model_path
    from hybrid.gguf import GGUFFile
    from hybrid.models.loader import pack_model
    from hybrid.placement.planner import plan

    select_isa(args.isa)
    with GGUFFile.open(model_path(model)) as file, byte_progress("packing") as progress:
        path, made = pack_model(
            file,
            plan=plan(file, rules),
            folder=Path(args.packed_cache),
            num_threads=args.threads,
            progress=progress,
        )
    state = "written" if made else "was there already"
    print(f"{path}: {format_bytes(path.stat().st_size)}, {state}")
    return 0
