"""`hybrid synth PRESET -o FILE`: a model file of a real shape with random weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.progress import byte_progress
from hybrid.cli.table import format_bytes, format_count
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.gguf import GGMLType
    from hybrid.synth import Formats, ModelShape, SynthReport

HELP = "write a model file of a real shape with random weights"

# Flag -> field of `hybrid.synth.Formats`, and its default there.
_FORMAT_FLAGS = {
    "experts": ("experts", "Q4_K"),
    "down": ("down", "Q4_K"),
    "dense": ("dense", "Q4_K"),
    "attention": ("attention", "Q4_K"),
    "embedding": ("embedding", "Q4_K"),
    "lm_head": ("output", "Q6_K"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET", help="deepseek-v2-lite, deepseek-v3, kimi-k2 or tiny")
    arguments.flag(parser, "-o", "--out", scope="synth", metavar="FILE")
    shape = parser.add_argument_group("shape")
    for name in ("--layers", "--num-experts", "--expert-width"):
        arguments.flag(shape, name, scope="synth", metavar="N")
    formats = parser.add_argument_group("formats")
    for name, (_, default) in _FORMAT_FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        arguments.flag(formats, flag, default=default, scope="synth", metavar="FORMAT")
    arguments.flag(formats, "--kv-b", default="split", scope="synth", metavar="LAYOUT")
    arguments.flag(parser, "-s", "--seed", default=0, scope="synth")
    arguments.flag(parser, "--header-only", scope="synth")
    arguments.flag(parser, "-f", "--force", scope="synth")


def run(args: argparse.Namespace) -> int:
    from hybrid.synth import Formats, resolve_shape

    if args.out is None:
        raise ConfigError("synth needs the file to write: -o FILE")
    target = Path(args.out)
    if target.is_dir():
        raise ConfigError(f"-o: {target} is a folder; name a file in it, such as {target / args.preset}.gguf")
    if not target.parent.is_dir():
        raise ConfigError(f"-o: the folder {target.parent} does not exist; make it first")
    if target.exists() and not args.force:
        raise ConfigError(f"{target} exists; use --force to overwrite it")
    shape = resolve_shape(
        args.preset,
        num_layers=args.layers,
        num_experts=args.num_experts,
        moe_intermediate_size=args.expert_width,
    )
    chosen = {field: _format(flag, getattr(args, flag)) for flag, (field, _) in _FORMAT_FLAGS.items()}
    _print_report(_write(args, target, shape, Formats(**chosen)), shape)
    return 0


def _format(flag: str, text: str) -> GGMLType:
    from hybrid.gguf import GGMLType

    if text.upper() not in GGMLType.__members__:
        name = flag.replace("_", "-")
        raise ConfigError(f"--{name}: unknown format {text!r}; formats are spelled like Q4_K or IQ4_XS")
    return GGMLType[text.upper()]


def _write(args: argparse.Namespace, target: Path, shape: ModelShape, formats: Formats) -> SynthReport:
    from hybrid.synth import synthesise

    with byte_progress(target.name) as progress:
        return synthesise(
            target,
            shape,
            formats,
            kv_b=args.kv_b,
            seed=args.seed,
            header_only=args.header_only,
            progress=progress,
        )


def _print_report(report: SynthReport, shape: ModelShape) -> None:
    for (wanted, cols), written in report.fallbacks.items():
        print(
            f"rows of {cols} weights are no whole blocks of {wanted.name}: {written.name} is written instead",
            file=sys.stderr,
        )
    if not shape.q_lora_rank and shape.num_layers not in (26, 27):
        print(
            "ik_llama.cpp loads a model without q_lora only if it has 26 or 27 layers",
            file=sys.stderr,
        )
    print(f"{report.path}: {format_bytes(report.n_bytes)}, {format_count(report.num_parameters)} parameters")
    if report.routing_bits is not None:
        print(
            f"routing entropy {report.routing_bits:.2f} of {report.max_routing_bits:.2f} bits"
            " (routers on random hidden states; the maximum is even use of all experts)"
        )
