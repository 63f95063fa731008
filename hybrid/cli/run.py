"""`hybrid run`: continue a prompt."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import stat
import sys
from types import FrameType
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.progress import prompt_progress
from hybrid.errors import ConfigError

if TYPE_CHECKING:
    from hybrid.engine.requests import TokenStream
    from hybrid.outputs import RequestOutput

HELP = "continue a prompt, printing the text as it is written"
DEMO_PROMPT = "Once upon a time"

_CONTROL_TO_REPLACEMENT = {
    code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        help="text to continue; - or none in a pipe: from stdin; the demo model has a default",
    )
    arguments.add_model(parser)
    arguments.flag(parser, "--echo")
    arguments.add_sampling(parser, n_predict=256)
    arguments.add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    prompt = read_prompt(args)
    params = arguments.sampling_params(args)
    with arguments.open_model(args) as llm, llm.stream(prompt, params) as stream:
        print(f"{llm.describe()}, seed {args.seed}", file=sys.stderr, flush=True)
        if args.echo or prompt is DEMO_PROMPT:
            write(prompt)
        code = print_stream(stream)
        write("\n")
        print(summary(stream.result()), file=sys.stderr)
        if (figures := llm.step_figures()) is not None:
            print(f"{args.trace}: {figures}", file=sys.stderr)
    return code


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt that is meant.

    Raises:
        ConfigError: there is none, or it is empty or not UTF-8.
    """
    prompt = args.prompt
    if prompt == "-":
        prompt = _read_stdin()
    elif prompt is None and _is_piped():
        print("reading the prompt from stdin", file=sys.stderr, flush=True)
        prompt = _read_stdin() or None
    if prompt is None:
        if args.model != "demo":
            raise ConfigError('no prompt: give one, as in `hybrid run -m MODEL "a prompt"`, or - for stdin')
        return DEMO_PROMPT
    if not prompt:
        raise ConfigError('the prompt is empty; give some text, as in `hybrid run "Once upon a time"`')
    return str(prompt)


def _is_piped() -> bool:
    """Whether stdin is a pipe or a file: not a terminal, /dev/null or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8 (byte {error.start})") from None


def print_stream(stream: TokenStream) -> int:
    """Print text as it becomes certain; returns 0, or 130 if Ctrl-C ended it.

    A prompt that takes long shows a bar while it is computed.
    Python drops a KeyboardInterrupt that is raised inside a finaliser or a callback from C, so the
    signal is noted as well and looked at after every piece of text.
    """
    interrupted = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        with prompt_progress() as stream.on_prompt:
            first = next(stream, None)
        for delta in itertools.chain(() if first is None else (first,), stream):
            write(delta.outputs[0].text)
            if interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        stream.close()
        return 130
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0


def write(text: str) -> None:
    """Text to stdout at once; what its encoding lacks becomes a question mark.

    A terminal gets no control characters but newline and tab: a model's text must not move its cursor.
    """
    encoding = sys.stdout.encoding or "utf-8"
    if sys.stdout.isatty():
        text = text.translate(_CONTROL_TO_REPLACEMENT)
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def summary(output: RequestOutput) -> str:
    """Token counts and rates of a finished request."""
    metrics, completion = output.metrics, output.outputs[0]
    if metrics is None:
        return f"prompt {len(output.prompt_token_ids)} tokens; stopped before the first token"
    cached = f", {metrics.num_cached_tokens} of them cached" if metrics.num_cached_tokens else ""
    return (
        f"prompt {_rate(metrics.num_prompt_tokens, metrics.prompt_tokens_per_s)}{cached}; "
        f"generated {_rate(metrics.num_generated_tokens, metrics.generated_tokens_per_s)}; "
        f"finished: {completion.finish_reason}"
    )


def _rate(count: int, tokens_per_s: float | None) -> str:
    tokens = "1 token" if count == 1 else f"{count} tokens"
    return tokens if tokens_per_s is None else f"{tokens}, {tokens_per_s:.2f} tokens/s"
