"""`hybrid inspect FILE`: what is in a model file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from hybrid.cli import arguments
from hybrid.cli.table import format_bytes, format_count, markdown_table

if TYPE_CHECKING:
    from hybrid.describe import ModelSummary
    from hybrid.gguf import GGUFFile

HELP = "show a GGUF file: metadata, tensors by role, bytes a token touches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="a GGUF file, or any shard of a split one; one without data (synth --header-only) will do",
    )
    arguments.add_model(parser)
    arguments.flag(parser, "-ctk", "--cache-type-k", "--kv-format", default="f16")
    arguments.flag(parser, "--isa", help="the CPU kernel ISA to look for kernels in")
    arguments.flag(parser, "--tensors", help="list every tensor (json always does)")
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    from hybrid.backends.isa import select_isa
    from hybrid.config import model_path
    from hybrid.describe import open_for_description, report, summarise
    from hybrid.kernels import cpu

    isa = select_isa(args.isa)
    with open_for_description(model_path(args.model if args.file is None else args.file)) as file:
        summary = summarise(
            file, kv_format=args.kv_format, has_kernel=lambda type_: cpu.has_kernel(type_, isa)
        )
        if args.output == "json":
            print(json.dumps(report(file, summary), indent=2, ensure_ascii=False))
        else:
            _print_markdown(file, summary, all_tensors=args.tensors)
    return 0


def _print_markdown(file: GGUFFile, summary: ModelSummary, *, all_tensors: bool) -> None:
    print(f"# {file.path.name}\n")
    print(_overview(file, summary))
    print("\n## Metadata\n")
    print(markdown_table(("key", "value"), [(key, _value_text(v)) for key, v in file.metadata.items()]))
    print("\n## Tensors by role\n")
    print(_role_table(summary))
    if all_tensors:
        print("\n## Tensors\n")
        print(_tensor_table(summary))
    if summary.without_kernel:
        _print_unrunnable(summary)


def _overview(file: GGUFFile, summary: ModelSummary) -> str:
    data = "header only, no tensor data" if summary.header_only else "complete"
    parameters = format_count(summary.parameters)
    rows = [
        ("architecture", summary.architecture),
        ("name", summary.name or "-"),
        ("file", f"GGUF v{file.version}, {len(file.paths)} file(s), {len(summary.tensors)} tensors, {data}"),
        ("parameters", f"{parameters}, {format_count(summary.active_parameters)} active per token"),
        ("weights", _exact_bytes(summary.n_bytes)),
        ("active bytes per token", _exact_bytes(summary.active_bytes)),
        (f"KV cache per token ({summary.kv_format})", _exact_bytes(summary.kv_bytes_per_token)),
    ]
    if summary.num_experts:
        rows.insert(3, ("experts", f"{summary.num_experts_per_tok} of {summary.num_experts} per token"))
    return markdown_table(("", ""), rows)


def _exact_bytes(n: int | None) -> str:
    return "-" if n is None else f"{format_bytes(n)} ({n} bytes)"


def _role_table(summary: ModelSummary) -> str:
    rows = [
        (
            role.role,
            str(role.num_tensors),
            format_count(role.parameters),
            format_bytes(role.n_bytes),
            format_bytes(role.active_bytes),
            ", ".join(role.formats),
        )
        for role in summary.roles
    ]
    rows.append(
        (
            "total",
            str(len(summary.tensors)),
            format_count(summary.parameters),
            format_bytes(summary.n_bytes),
            format_bytes(summary.active_bytes),
            "",
        )
    )
    numbers = ("tensors", "params", "bytes", "active bytes")
    return markdown_table(("role", *numbers, "formats"), rows, right=numbers)


def _tensor_table(summary: ModelSummary) -> str:
    rows = []
    for tensor in summary.tensors:
        info = tensor.info
        shape = " × ".join(map(str, info.shape))
        rows.append((info.name, tensor.role, shape, info.type.name, format_bytes(info.n_bytes)))
    return markdown_table(("name", "role", "shape", "format", "bytes"), rows, right=("bytes",))


def _print_unrunnable(summary: ModelSummary) -> None:
    from hybrid.describe import formats_of

    counts = formats_of(summary, summary.without_kernel)
    formats = ", ".join(f"{count} × {name}" for name, count in counts.items())
    print(f"\nThis build has no kernel for {formats}, so it cannot run this file. Tensors:")
    for name in summary.without_kernel:
        print(f"- {name}")


def _value_text(value: Any) -> str:
    from hybrid.describe import shorten

    short = shorten(value)
    if isinstance(short, dict):
        kind = "characters" if isinstance(short["first"], str) else "values"
        short = f"{short['length']} {kind}: {json.dumps(short['first'], ensure_ascii=False)[:80]} …"
    if isinstance(short, float):
        short = f"{short:.7g}"  # files hold float32
    return str(short).replace("\n", "\\n").replace("|", "\\|")
