"""The generation API: text, token ids or messages in, text out."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from tqdm import tqdm

from hybrid.chat import ChatTemplate
from hybrid.engine.load import LoadOptions, ModelOptions, load, shows_model_options
from hybrid.engine.prompts import ParsedPrompt, Prompt, parse_prompt
from hybrid.engine.requests import Requests, TokenStream
from hybrid.engine.stats import EngineStats
from hybrid.engine.thread import Event
from hybrid.errors import RequestError
from hybrid.outputs import RequestOutput
from hybrid.placement.planner import Plan
from hybrid.placement.rules import Rules
from hybrid.sampling_params import SamplingParams
from hybrid.tokenizer import Tokenizer
from hybrid.trace import StepFigures, step_figures

Message = Mapping[str, Any]


class LLM:
    """A loaded model that writes text.

    The model runs on a thread of its own, so it works in notebooks, and several threads may use it: their
    requests run together. It prints nothing and installs no signal handlers; `close` frees everything, and a
    ``with`` statement calls it.

    Args:
        model: a GGUF file (any shard of a split one); ``None`` or ``"demo"`` for the bundled model.
        rules: where tensors go; ``"auto"`` decides by itself.
        max_model_len: tokens of prompt and text together; the cache is made for them. Default: the rules',
            else what the model was made for, at most 8192; 0: what the model was made for.
        num_threads: CPU threads. Default: ``HYBRID_THREADS``, else one for each physical core.
        isa: CPU kernels to use. Default: ``HYBRID_ISA``, else the best of the host.
        kv_format: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``. Default: the rules', else ``"f16"``.
        seed: requests without a seed of their own follow from it.
        max_num_seqs: texts written at once.
        max_num_batched_tokens: tokens of one step; longer prompts are computed in chunks.
        progress: called with (bytes read, bytes in all) while the model loads.
        ram_bytes: RAM that weights, cache and working memory may take. Default: what is free.
        fit: shorten the context, then the steps, until the model fits.
        experts_per_token: run so many of the experts chosen for a token, the best. Default: the rules',
            else all.
        expert_threshold: run those whose weight is at least this share, 0 to 1, of the token's largest.
            Default: the rules', else all, as 0 means.
        kv_cache_tokens: tokens the cache holds, of running requests and of what may be used again; at least
            ``max_model_len``. Default: ``max_num_seqs`` contexts, or fewer where RAM holds no more.
        numa: where weights on the CPU go on a machine with several NUMA nodes, unless a rule says:
            ``"auto"``, ``"replicate"``, ``"shard"``, ``"interleave"``, ``"node:N"`` or ``"none"``
            (`hybrid.placement.numa`).
        packed_cache: a folder that keeps the weights as the kernels take them: written at the first start,
            mapped into memory later (or copied, where weights have nodes). The files in it must stay as
            they are while the model is in use.
        cuda_graph: decode steps of GPUs are captured once and replayed; ``False`` has Python queue each of
            them, to look for faults. The tokens are the same.
        trace: a file for what runs when, as a Chrome trace; it is written when the model is closed.
        vram_bytes: ``cuda:N`` -> bytes of it that may be used in all, the driver's own included: the plan's
            budget and the run's hard cap. Default: what the card has, less 0.5 GiB.

    Raises:
        HybridError: the file, an option or the machine does not allow it; the subclass says which.
        OSError: the file cannot be read.
    """

    @shows_model_options
    def __init__(
        self,
        model: str | Path | None = None,
        rules: Rules = "auto",
        max_model_len: int | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[ModelOptions],
    ) -> None:
        self._loaded = load(model, LoadOptions(rules, max_model_len, **options), progress)
        self._requests = Requests(self._loaded.engine, self._loaded.tokenizer)

    @property
    def errored(self) -> BaseException | None:
        """What ended the engine; ``None`` while it works."""
        return self._requests.errored

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template; its ``problem`` says why it cannot be used, if so."""
        return self._loaded.chat_template

    @property
    def max_model_len(self) -> int:
        return self._loaded.engine.config.max_model_len

    def plan(self) -> Plan:
        """Where every tensor lies."""
        return self._loaded.plan

    def describe(self) -> str:
        """One line: what runs where, with which kernels, threads and context."""
        return self._loaded.describe()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; results in their order.

        Args:
            prompts: texts, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``, one or several.
            sampling_params: for all, or one for each prompt.
            use_tqdm: show a progress bar when stderr is a terminal.

        Raises:
            RequestError: a prompt or parameter is invalid; nothing was computed. `ContextLengthError`, a
                subclass, says that a prompt does not fit.
        """
        several = isinstance(prompts, Sequence) and not isinstance(prompts, str)
        parsed = [self._parse(prompt) for prompt in (prompts if several else [prompts])]
        return self._generate(parsed, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several.

        Args:
            messages: ``{"role": ..., "content": ...}`` mappings, or a sequence of such conversations.
            template_options: passed to `ChatTemplate.encode`: ``add_generation_prompt``, ``tools``, ...

        Raises:
            TokenizerError: the model has no usable chat template.
            RequestError: as `generate`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        parsed = [self._render(conversation, template_options) for conversation in conversations]
        return self._generate(parsed, sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> TokenStream:
        """Complete one prompt, token by token.

        Each `RequestOutput` holds what is new: token ids, log-probabilities, and text as far as it is
        certain. Closing the stream ends the request. Invalid requests raise before the first one.
        """
        return self._requests.stream(self._parse(prompt), sampling_params)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template_options: Any,
    ) -> TokenStream:
        """`stream` for a conversation."""
        return self._requests.stream(self._render(messages, template_options), sampling_params)

    def step_figures(self) -> StepFigures | None:
        """Times of the decode steps by now; ``None`` without a ``trace``, or before the first step."""
        trace = self._loaded.trace
        return None if trace is None else step_figures(trace.spans)

    def stats(self) -> EngineStats:
        """What runs, what waits, and what was done so far."""
        return self._requests.stats()

    def close(self) -> None:
        """Free the model. Calling it again does nothing; any other use afterwards is an error."""
        self._requests.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse(self, prompt: Any) -> ParsedPrompt:
        self._requests.check_open()
        return parse_prompt(prompt, self.tokenizer)

    def _render(self, messages: Any, options: dict[str, Any]) -> ParsedPrompt:
        self._requests.check_open()
        return ParsedPrompt(None, self.chat_template.encode(messages, **options))

    def _generate(
        self,
        prompts: list[ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if isinstance(sampling_params, Sequence):
            params: list[SamplingParams | None] = list(sampling_params)
        else:
            params = [sampling_params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                "wrong number",
                field="sampling_params",
                expected=f"one, or one for each of {len(prompts)} prompts",
                found=len(params),
            )
        ends: queue.SimpleQueue[Event] = queue.SimpleQueue()

        def deliver(event: Event) -> None:
            if isinstance(event, BaseException) or (isinstance(event, RequestOutput) and event.finished):
                ends.put(event)

        requests = [
            self._requests.prepare(prompt, each, deliver)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        try:
            for request in requests:
                self._requests.submit(request)
            self._await_all(ends, len(requests), use_tqdm)
        except BaseException:
            for request in requests:
                self._requests.abort(request)
            raise
        return [request.state.result() for request in requests]

    def _await_all(self, ends: queue.SimpleQueue[Event], count: int, use_tqdm: bool) -> None:
        with tqdm(total=count, unit="prompt", disable=None if use_tqdm else True) as bar:
            for _ in range(count):
                event = ends.get()
                if isinstance(event, BaseException):
                    raise event
                bar.update()
