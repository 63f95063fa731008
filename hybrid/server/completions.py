"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Any

from hybrid.outputs import CompletionOutput
from hybrid.server import sse
from hybrid.server.context import ServerContext
from hybrid.server.errors import refuse
from hybrid.server.generation import Job, Output, Progress
from hybrid.server.json_response import to_json
from hybrid.server.logprobs import TextLogprobs
from hybrid.server.protocol import MAX_PROMPTS, MAX_TOP_LOGPROBS, CompletionBody
from hybrid.server.record import Record
from hybrid.server.respond import Answer
from hybrid.server.sampling import num_choices, sampling_params


class CompletionAnswer(Answer):
    """Text completions of one or several prompts, streamed or whole."""

    def __init__(self, context: ServerContext, body: CompletionBody) -> None:
        self._engine, self._card = context.check_ready()
        self._body = body
        self._created = int(context.clock())
        self.record = Record(context.new_id("cmpl-"))
        self.stream, self.wants_progress = body.stream, body.return_progress
        self._prompts = _prompts(body.prompt)
        self._n = num_choices(body)
        _check(body, self._n)
        tokenizer = self._engine.tokenizer
        self._choices = [
            TextChoice(index, TextLogprobs(tokenizer, body.logprobs or 0))
            for index in range(self._n * len(self._prompts))
        ]

    def jobs(self) -> list[Job]:
        body = self._body
        wants_prompt = body.echo and body.logprobs is not None
        params = sampling_params(
            body,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if wants_prompt else None,
            response_format=body.response_format,
        )
        several = len(self._prompts) > 1
        return [
            Job(
                {"prompt_token_ids": self._encode(prompt, index)},
                params,
                f"{self.record.request_id}-{index}" if several else self.record.request_id,
            )
            for index, prompt in enumerate(self._prompts)
        ]

    def add(self, event: Output) -> None:
        for completion in event.output.outputs:
            choice = self._choice(event, completion)
            text, logprobs = self._new(choice, event, completion)
            choice.text.append(text)
            choice.token_ids += completion.token_ids
            choice.finish_reason = completion.finish_reason or choice.finish_reason
            for key, values in (logprobs or {}).items():
                choice.logprobs.setdefault(key, []).extend(values)

    def body(self) -> dict[str, Any]:
        wants_logprobs = self._body.logprobs is not None
        return {
            "id": self.record.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._card.name,
            "choices": [
                {
                    "index": choice.index,
                    "text": "".join(choice.text),
                    "logprobs": choice.logprobs if wants_logprobs else None,
                    "finish_reason": choice.finish_reason,
                    **self._ids(choice.token_ids),
                }
                for choice in self._choices
            ],
            "usage": self.record.usage(),
            "timings": self.record.timings(),
        }

    def opening(self) -> bytes:
        return b""

    def chunks(self, event: Output) -> bytes:
        data = b""
        for completion in event.output.outputs:
            choice = self._choice(event, completion)
            text, logprobs = self._new(choice, event, completion)
            said = text or (logprobs and logprobs["tokens"]) or self._body.return_token_ids
            if said or completion.finish_reason is not None:
                extra = {"timings": self.record.timings()} if event.output.finished else {}
                new = {"index": choice.index, "text": text, "logprobs": logprobs}
                new |= {"finish_reason": completion.finish_reason, **self._ids(completion.token_ids)}
                data += sse.event(self._envelope([new], extra))
        return data

    def progress(self, event: Progress) -> bytes:
        progress = {"prompt": event.prompt_index, "total": event.total, "processed": event.computed}
        return sse.event(self._envelope([], {"prompt_progress": progress}))

    def closing(self) -> bytes:
        if not self._body.include_usage:
            return sse.DONE
        return sse.event(self._envelope([], {"usage": self.record.usage()})) + sse.DONE

    def prompt_text(self) -> str:
        return to_json(self._body.prompt)

    def _encode(self, prompt: str | list[int], index: int) -> list[int]:
        if not prompt:
            refuse(f"prompt[{index}]: is empty", "prompt")
        if isinstance(prompt, list):
            return prompt
        return self._engine.tokenizer.encode(prompt)

    def _choice(self, event: Output, completion: CompletionOutput) -> TextChoice:
        return self._choices[event.prompt_index * self._n + completion.index]

    def _new(
        self, choice: TextChoice, event: Output, completion: CompletionOutput
    ) -> tuple[str, dict[str, Any] | None]:
        """Text and log-probabilities that an output adds; the first has the prompt too if it is wanted."""
        text, logprobs = completion.text, None
        if self._body.logprobs is not None:
            logprobs = choice.entries.of(completion)
        if self._body.echo and not choice.begun:
            text = self._prompt_text(event) + text
            if logprobs is not None:
                choice.entries = TextLogprobs(self._engine.tokenizer, self._body.logprobs or 0)
                output = event.output
                before = choice.entries.of_prompt(output.prompt_token_ids, output.prompt_logprobs)
                logprobs = choice.entries.of(completion)
                logprobs = {key: before[key] + logprobs[key] for key in before}
        choice.begun = True
        return text, logprobs

    def _prompt_text(self, event: Output) -> str:
        prompt = self._prompts[event.prompt_index]
        return prompt if isinstance(prompt, str) else self._engine.tokenizer.decode(prompt)

    def _ids(self, token_ids: list[int]) -> dict[str, list[int]]:
        return {"token_ids": token_ids} if self._body.return_token_ids else {}

    def _envelope(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._body.include_usage else {}
        return {
            "id": self.record.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._card.name,
            "choices": choices,
            **usage,
            **extra,
        }


class TextChoice:
    """One choice and what it has said."""

    def __init__(self, index: int, entries: TextLogprobs) -> None:
        self.index, self.entries = index, entries
        self.begun = False
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: dict[str, list[Any]] = {}
        self.finish_reason: str | None = None


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        refuse("prompt: is empty", "prompt")
    if isinstance(prompt[0], int):
        return [[each for each in prompt if isinstance(each, int)]]
    return [each for each in prompt if isinstance(each, str | list)]


def _check(body: CompletionBody, n: int) -> None:
    if (
        isinstance(body.prompt, list)
        and not isinstance(body.prompt[0], int)
        and len(body.prompt) > MAX_PROMPTS
    ):
        refuse(f"prompt: expected at most {MAX_PROMPTS} prompts, found {len(body.prompt)}", "prompt")
    if body.suffix:
        refuse("suffix: is not supported", "suffix", "unsupported")
    if body.best_of is not None and body.best_of != n:
        refuse(f"best_of: expected n = {n}, found {body.best_of}; choices are not ranked", "best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
        refuse(f"logprobs: expected 0 to {MAX_TOP_LOGPROBS}, found {body.logprobs}", "logprobs")
