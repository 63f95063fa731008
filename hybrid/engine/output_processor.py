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


class RequestState:
    """One request from its first to its last token."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        detokenizer: Detokenizer,
        decode: Callable[[int], str],
    ) -> None:
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self.params, self._decode = params, decode
        self._stream = TextStream(
            detokenizer,
            params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cumulative_logprob = 0.0
        self._prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
        self._metrics: RequestMetrics | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def update(self, output: TokenOutput) -> RequestOutput:
        """Take in a token; returns what it adds. `finished` may turn true by a stop string."""
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self._metrics = output.metrics
        text = self._stream.push(output.sampled.token_id) if output.is_text else ""
        if self.finished:
            text += self._stream.finish()
        if self._stream.stopped_by is not None:
            self.finish_reason, self.stop_reason = "stop", self._stream.stopped_by
        self._text.append(text)
        self._token_ids.append(output.sampled.token_id)
        prompt_logprobs = _decode_prompt(output.prompt_logprobs, self._decode)
        self._prompt_logprobs = prompt_logprobs or self._prompt_logprobs
        entries = None
        if output.sampled.logprobs is not None:
            self._cumulative_logprob += output.sampled.logprob or 0.0
            entries = [_decode_entry(output.sampled.logprobs, self._decode)]
            self._logprobs += entries
        return self._output(text, [output.sampled.token_id], entries, prompt_logprobs)

    def abort(self) -> RequestOutput:
        """End the request from outside; returns the text that was held back."""
        text = self._stream.finish()
        self._text.append(text)
        self.finish_reason, self.stop_reason = "abort", None
        return self._output(text, [], None, None)

    def result(self) -> RequestOutput:
        """Everything so far."""
        wants_logprobs = self.params.logprobs is not None
        return self._output(
            "".join(self._text),
            list(self._token_ids),
            self._logprobs if wants_logprobs else None,
            self._prompt_logprobs,
        )

    def _output(
        self,
        text: str,
        token_ids: list[int],
        logprobs: Sequence[TokenLogprobs] | None,
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
    ) -> RequestOutput:
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=None if self.params.logprobs is None else self._cumulative_logprob,
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[completion],
            finished=self.finished,
            metrics=self._metrics,
        )


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
