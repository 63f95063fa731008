"""From the engine's tokens to what users of the API see: text, stop strings, decoded log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hybrid.engine.detokenize import Detokenizer, TextStream
from hybrid.engine.sequence import TokenOutput
from hybrid.outputs import (
    CompletionOutput,
    FinishReason,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
    VocabularyLogprobs,
)
from hybrid.sampling_params import SamplingParams


class _Completion:
    """One text of a request."""

    def __init__(
        self, index: int, params: SamplingParams, detokenizer: Detokenizer, decode: Callable[[int], str]
    ) -> None:
        self.index, self._decode = index, decode
        self._wants_logprobs = params.logprobs is not None
        self._stream = TextStream(
            detokenizer,
            params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    def update(self, output: TokenOutput) -> CompletionOutput:
        """Take in a token; returns what it adds."""
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        text = self._stream.push(output.sampled.token_id) if output.is_text else ""
        if self.finish_reason is not None:
            text += self._stream.finish()
        if self._stream.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", self._stream.stopped_by
        self._text.append(text)
        self.token_ids.append(output.sampled.token_id)
        entries = None
        if output.sampled.logprobs is not None:
            self._cumulative_logprob += output.sampled.logprob or 0.0
            entries = [_decode_entry(output.sampled.logprobs, self._decode)]
            self._logprobs += entries
        return self._output(text, [output.sampled.token_id], entries)

    def abort(self) -> CompletionOutput:
        """End it from outside; returns the text that was held back."""
        text = self._stream.finish()
        self._text.append(text)
        self.finish_reason, self.stop_reason = "abort", None
        return self._output(text, [], None)

    def result(self) -> CompletionOutput:
        logprobs = self._logprobs if self._wants_logprobs else None
        return self._output("".join(self._text), list(self.token_ids), logprobs)

    def _output(
        self, text: str, token_ids: list[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=self._cumulative_logprob if self._wants_logprobs else None,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestState:
    """One request from its first to its last token. ``make_detokenizer`` is called for each of its texts."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        make_detokenizer: Callable[[], Detokenizer],
        decode: Callable[[int], str],
    ) -> None:
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self._decode = decode
        self._completions = [_Completion(i, params, make_detokenizer(), decode) for i in range(params.n)]
        self._prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
        self._metrics: RequestMetrics | None = None  # of the first text's prompt, and of all texts
        self._num_cached_tokens = 0

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self._completions)

    def text_finished(self, index: int) -> bool:
        """Whether this text has ended, maybe by a stop string."""
        return self._completions[index].finish_reason is not None

    def update(self, output: TokenOutput) -> RequestOutput:
        """Take in a token; returns what it adds. A text may end with it by a stop string."""
        if output.index == 0:
            self._num_cached_tokens = output.num_cached_tokens
        new = self._completions[output.index].update(output)
        prompt_logprobs = _decode_prompt(output.prompt_logprobs, self._decode)
        self._prompt_logprobs = prompt_logprobs or self._prompt_logprobs
        self._metrics = self._merged(output.metrics)
        return self._output([new], prompt_logprobs)

    def abort(self) -> RequestOutput:
        """End the request from outside; returns the text that was held back."""
        return self._output([c.abort() for c in self._completions if c.finish_reason is None], None)

    def result(self) -> RequestOutput:
        """Everything so far."""
        return self._output([completion.result() for completion in self._completions], self._prompt_logprobs)

    def _merged(self, latest: RequestMetrics) -> RequestMetrics:
        """Metrics of the request, given those of the text that got a token last."""
        first = self._metrics or latest
        count = sum(len(completion.token_ids) for completion in self._completions)
        generation_s = _first_token_s(latest) + (latest.generation_s or 0.0) - _first_token_s(first)
        return replace(first, num_generated_tokens=count, generation_s=generation_s)

    def _output(
        self,
        completions: list[CompletionOutput],
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=completions,
            finished=self.finished,
            metrics=self._metrics,
            num_cached_tokens=self._num_cached_tokens,
        )


def _first_token_s(metrics: RequestMetrics) -> float:
    return metrics.first_token_s or 0.0


def _decode_entry(entry: TokenLogprobs, decode: Callable[[int], str]) -> TokenLogprobs:
    if isinstance(entry, VocabularyLogprobs):
        return VocabularyLogprobs(entry.row, decode)
    return {token_id: replace(item, decoded_token=decode(token_id)) for token_id, item in entry.items()}


def _decode_prompt(
    entries: PromptLogprobs | list[TokenLogprobs | None] | None, decode: Callable[[int], str]
) -> Sequence[TokenLogprobs | None] | None:
    if entries is None:
        return None
    if isinstance(entries, PromptLogprobs):
        return PromptLogprobs(entries.array, decode)
    return [None if entry is None else _decode_entry(entry, decode) for entry in entries]
