"""`hybrid perplexity FILE TEXT`: how well a model predicts a text, and how far it is from another."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.progress import byte_progress, status_line
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.perplexity import Estimate

HELP = "score a text: perplexity, and divergence from a base run"

_DEFAULT_CONTEXT = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Windows of the text that share nothing; the second half of each is scored, as llama-perplexity does."
        " First run with --save-logprobs FILE, then others with --kl-base FILE to compare with it."
    )
    parser.usage = f"{parser.prog} [options] [MODEL] TEXT"
    parser.add_argument("inputs", nargs="+", metavar="[MODEL] TEXT", help="model, or -m; text file, or -")
    arguments.add_model(parser)
    arguments.flag(parser, "--chunks")
    arguments.flag(parser, "--kl-base")
    arguments.flag(parser, "--save-logprobs")
    arguments.flag(parser, "-o", "--output", default="md", choices=("md", "json"))
    arguments.add_runtime(parser, context=f"tokens of a window (default: {_DEFAULT_CONTEXT})")


def run(args: argparse.Namespace) -> int:
    from hybrid.engine.load import LoadOptions, load
    from hybrid.forward import SingleSequence
    from hybrid.perplexity import cut_windows, evaluate

    model, text_path = _inputs(args)
    text = read_text(text_path)
    options = LoadOptions(
        arguments.rules_for(args, model),
        _DEFAULT_CONTEXT if args.ctx_size is None else args.ctx_size,
        **arguments.runtime_options(args),
    )
    arguments.end_on_bus_error(args)
    with byte_progress("loading") as progress:
        loaded = load(model, options, progress)
    try:
        size = loaded.plan.size
        n_ctx, tokenizer = size.max_model_len, loaded.tokenizer
        bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        ids = tokenizer.encode(text, add_special=False)
        windows = cut_windows(ids if bos_id is None else [bos_id, *ids], n_ctx, bos_id, args.chunks)
        source = SingleSequence(loaded.engine.model, n_ctx, size.max_num_batched_tokens)
        with status_line() as show:
            for estimate in evaluate(source, windows, base=args.kl_base, save=args.save_logprobs):
                show(_running(estimate))
    finally:
        loaded.engine.close()
    if args.output == "json":
        print(json.dumps({"n_ctx": n_ctx, **estimate.report()}, indent=2))
    else:
        _print_result(estimate)
    return 0


def _inputs(args: argparse.Namespace) -> tuple[str, str]:
    """(model, text file); the model is the first of two positional arguments, or ``-m``."""
    if len(args.inputs) > 2:
        raise ConfigError(f"perplexity takes a model and a text, found {len(args.inputs)} files")
    return (args.inputs[0] if len(args.inputs) == 2 else args.model), args.inputs[-1]


def read_text(path: str) -> str:
    """A text file, or stdin for ``-``; one newline at its end is dropped, as llama.cpp does.

    Raises:
        ConfigError: unreadable, not UTF-8, or empty.
    """
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the text: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the text is not UTF-8 at byte {error.start}") from None
    if not text:
        raise ConfigError(f"{path}: the text is empty")
    return text.removesuffix("\n")


def _running(estimate: Estimate) -> str:
    text = f"[{estimate.windows_done}/{estimate.num_windows}] PPL {estimate.perplexity:.4f}"
    return f"{text}, KL {estimate.kl.mean:.6f}" if estimate.compares else text


def _print_result(estimate: Estimate) -> None:
    print(f"{estimate.windows_done} chunks, {estimate.nll.count} tokens scored")
    print(f"PPL = {estimate.perplexity:.4f} ± {estimate.perplexity_error:.5f}")
    if not estimate.compares:
        return
    report = estimate.report()
    ratio, error = report["log_perplexity_ratio"], report["log_perplexity_ratio_error"]
    print(f"base PPL = {report['base_perplexity']:.4f}, ln(PPL / base PPL) = {ratio:.6f} ± {error:.6f}")
    print(f"mean KL = {report['kl_mean']:.6f} ± {report['kl_mean_error']:.6f}")
    print(f"KL median {report['kl_median']:.6f}, 99 % {report['kl_p99']:.6f}, max {report['kl_max']:.6f}")
    agreement, error = 100 * report["top1_agreement"], 100 * report["top1_agreement_error"]
    print(f"same top token = {agreement:.3f} ± {error:.3f} %")
