"""`hybrid profile MODEL`: which experts a model uses, for a cache of the hot ones."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.progress import byte_progress, status_line
from hybrid.cli.table import markdown_table
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.placement.usage import UsageProfile

HELP = "run texts and write which experts they use, for `experts: cache:` in rules"

_DEFAULT_CONTEXT = 512
_DEMO_TEXT = "Once upon a time there was a little girl who lived near a forest. One day she met an old man."
_SHARES = (0.1, 0.25, 0.5)  # of the experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "The text is cut into prompts that fill the context but for -n tokens, which the model writes; uses "
        "are counted apart for prompts and for what is written. Rules name the file: "
        "`experts: {cache: {profile: FILE}}`."
    )
    parser.add_argument("file", nargs="?", metavar="MODEL", help="a GGUF file (default: -m)")
    arguments.add_model(parser)
    arguments.flag(parser, "--text", scope="profile")
    arguments.flag(parser, "-o", "--out", scope="profile")
    arguments.flag(parser, "--chunks", help="prompts to take of the text (default: all)")
    arguments.flag(parser, "-np", "--parallel", default=4)
    arguments.add_sampling(parser, n_predict=64)
    arguments.add_runtime(parser, context=f"tokens of a prompt and its text (default: {_DEFAULT_CONTEXT})")


def run(args: argparse.Namespace) -> int:
    from hybrid.engine.load import LoadOptions, load
    from hybrid.placement.usage import write_profile
    from hybrid.profiling import cut_prompts, profile_usage

    model = args.model if args.file is None else args.file
    if args.out is None:
        raise ConfigError("profile needs the file to write: -o FILE (or HYBRID_PROFILE_OUT)")
    text = _text(args, model)
    params = arguments.sampling_params(args)
    context = _DEFAULT_CONTEXT if args.ctx_size is None else args.ctx_size
    rules = arguments.rules_for(args, model)
    options = LoadOptions(rules, context, max_num_seqs=args.parallel, **arguments.runtime_options(args))
    arguments.end_on_bus_error(args)
    with byte_progress("loading") as progress:
        loaded = load(model, options, progress)
    try:
        size, tokenizer = loaded.plan.size, loaded.tokenizer
        length = size.max_model_len - (params.max_tokens or 1)
        if length < 1:
            raise ConfigError(
                f"-n: expected fewer than the {size.max_model_len} tokens of the context, "
                f"found {params.max_tokens}"
            )
        bos_id = tokenizer.bos_id if tokenizer.add_bos else None
        prompts = cut_prompts(tokenizer.encode(text, add_special=False), length, bos_id, args.chunks)
        with status_line() as show:
            found = profile_usage(
                loaded, prompts, params, lambda done, total: show(f"[{done}/{total}] texts")
            )
    finally:
        loaded.engine.close()
    write_profile(found, args.out)
    print(summary(found, args.out))
    return 0


def _text(args: argparse.Namespace, model: str) -> str:
    if args.text is not None:
        from hybrid.cli.perplexity import read_text

        return read_text(args.text)
    if model != "demo":
        raise ConfigError(
            "profile needs a text like those the model will be used for: --text FILE, or - for stdin"
        )
    return _DEMO_TEXT


def summary(profile: UsageProfile, path: str) -> str:
    """How unevenly experts are used: the share of uses that the most used of them take."""
    tokens = profile.usage.tokens
    rows = []
    for phase in ("prompt", "decode"):
        counts = sorted(
            (count for layer in profile.usage.layers.values() for count in layer[phase]), reverse=True
        )
        total = sum(counts)
        if total:
            parts = (f"{sum(counts[: round(len(counts) * share)]) / total:.1%}" for share in _SHARES)
            rows.append((phase, str(tokens[phase]), *parts))
    header = ("steps", "tokens", *(f"uses of the top {share:.0%}" for share in _SHARES))
    layers = f"{len(profile.usage.layers)} layers of {profile.num_experts} experts"
    return f"{path}: {layers}\n\n{markdown_table(header, rows, right=header[1:])}"
