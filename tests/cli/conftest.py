"""A language model without a model: answers are written down beforehand."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from hybrid.cli import arguments
from hybrid.errors import ContextLengthError
from hybrid.outputs import CompletionOutput, RequestMetrics, RequestOutput


class FakeStream:
    def __init__(self, pieces):
        self.pieces, self.written, self.closed = iter(pieces), [], False
        self.on_prompt = None
        self.prompt_steps = ()

    def __iter__(self):
        return self

    def __next__(self):
        for step in self.prompt_steps:
            self.on_prompt(*step)
        self.prompt_steps = ()
        piece = next(self.pieces)
        if piece is KeyboardInterrupt:
            raise KeyboardInterrupt
        self.written.append(piece)
        return self.output(piece)

    def output(self, text):
        metrics = RequestMetrics(4, len(self.written), queue_s=0.0, prompt_s=2.0, generation_s=0.5)
        return RequestOutput(
            "0", None, [1, 2, 3, 4], outputs=[CompletionOutput(0, text, [], finish_reason="stop")],
            metrics=metrics if self.written else None,
        )  # fmt: skip

    def result(self):
        return self.output("".join(self.written))

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class FakeLLM:
    def __init__(self):
        self.pieces = ["Hello", ", ", "wörld"]
        self.prompt_steps = ()  # (tokens computed, in all) between the steps of a prompt
        self.calls, self.streams, self.closed = [], [], False
        self.chat_template = SimpleNamespace(problem=None)
        self.options = None

    def describe(self):
        return "fake.gguf: all on cpu; ISA scalar, 1 threads, context 64"

    def step_figures(self):
        return None

    def stream(self, prompt, params):
        self.calls.append((prompt, params))
        self.streams.append(FakeStream(self.pieces))
        self.streams[-1].prompt_steps = self.prompt_steps
        return self.streams[-1]

    def stream_chat(self, messages, params):
        if len(messages[-1]["content"]) > 40:
            raise ContextLengthError(41, 40)
        return self.stream([dict(message) for message in messages], params)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True


@pytest.fixture
def fake_llm(monkeypatch):
    llm = FakeLLM()

    def open_model(args, **options):
        llm.options = {**vars(args), **options}
        return llm

    monkeypatch.setattr(arguments, "open_model", open_model)
    return llm


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    for name in list(os.environ):
        if name.startswith("HYBRID_"):
            monkeypatch.delenv(name)
