"""`hybrid chat`: talk to a model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from hybrid.cli import arguments
from hybrid.cli.run import print_stream, summary, write
from hybrid.errors import ContextLengthError, RequestError, TokenizerError

if TYPE_CHECKING:
    from hybrid.llm import LLM
    from hybrid.sampling_params import SamplingParams

HELP = "talk to a model; /clear forgets, /exit or end of input leaves"
COMMANDS = "/clear forgets the conversation, /exit leaves"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.flag(parser, "-sys", "--system")
    arguments.add_sampling(parser, n_predict=-1)
    arguments.add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    params = arguments.sampling_params(args)
    with arguments.open_model(args, seed=args.seed) as llm:
        if llm.chat_template.problem is not None:
            raise TokenizerError(f"no chat with this model: {llm.chat_template.problem}")
        print(f"{llm.describe()}, seed {args.seed}; {COMMANDS}", file=sys.stderr, flush=True)
        return Conversation(llm, params, args.system).talk()


class Conversation:
    """Messages so far. One bad message, or Ctrl-C during an answer, does not end it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm, self._params, self._system = llm, params, system
        self._interactive = sys.stdin.isatty()
        self._failed = False
        self.clear()

    def clear(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def talk(self) -> int:
        """Answer line after line; returns 1 if a line of a script could not be answered."""
        if self._interactive:
            import readline  # noqa: F401  line editing for input()
        while (line := self._read_line()) is not None:
            if line == "/clear":
                self.clear()
            elif line in ("/exit", "/quit"):
                break
            elif line == "/help":
                print(COMMANDS, file=sys.stderr)
            elif line.startswith("/"):
                print(f"unknown command {line.split()[0]!r}: {COMMANDS}", file=sys.stderr)
            elif line.strip():
                self._answer(line)
        return int(self._failed and not self._interactive)

    def _read_line(self) -> str | None:
        if self._interactive:
            try:
                return input("> ")
            except EOFError:
                write("\n")
                return None
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None

    def _answer(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        try:
            with self._llm.stream_chat(self.messages, self._params) as stream:
                print_stream(stream)
                write("\n")
                result = stream.result()
        except RequestError as error:
            self.messages.pop()
            self._failed = True
            hint = "; /clear makes room" if isinstance(error, ContextLengthError) else ""
            print(f"{error}{hint}", file=sys.stderr)
            return
        self.messages.append({"role": "assistant", "content": result.outputs[0].text})
        print(summary(result), file=sys.stderr)
