"""`hybrid pull SOURCE`: download a model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybrid.cli import arguments
from hybrid.cli.progress import byte_progress

HELP = "download a model: user/repo:QUANT or a URL; goes on where it was interrupted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="user/repo:QUANT, as in user/model-GGUF:Q4_K_M, or a URL"
    )
    arguments.flag(parser, "-o", "--out", scope="pull", metavar="FOLDER")


def run(args: argparse.Namespace) -> int:
    from hybrid.pull import find, pull

    files = find(args.source)
    with byte_progress(files[0].name) as progress:
        pulled = pull(files, Path(args.out or "."), progress)
    for file in pulled:
        state = "as the server has it" if file.verified else "which the server told nothing to compare with"
        print(f"{file.path}: SHA-256 {file.sha256}, {state}", file=sys.stderr)
    print(pulled[0].path)
    return 0
