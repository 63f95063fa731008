"""The engine: requests of token ids in, tokens out, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import torch

from hybrid.config import EngineConfig
from hybrid.engine.logprobs import PromptLogprobsBuilder, check_whole_vocabulary_size
from hybrid.engine.model_runner import CausalLM, ModelRunner
from hybrid.engine.sampler import Sampler
from hybrid.engine.scheduler import Scheduler
from hybrid.engine.sequence import Sequence, TokenOutput
from hybrid.engine.torch_threads import single_torch_thread
from hybrid.errors import ConfigError, ContextLengthError, RequestError
from hybrid.sampling_params import MAX_SEED, WHOLE_VOCABULARY, SamplingParams


class Engine:
    """Owns the model, its cache and the running requests. Knows token ids only, and no text.

    Not thread-safe. ``end_token_ids`` are the model's own end tokens.

    Raises:
        ConfigError: ``max_model_len`` is more than the model was made for.
    """

    def __init__(
        self, model: CausalLM, config: EngineConfig, *, end_token_ids: frozenset[int] = frozenset()
    ) -> None:
        check_context(config, model.config.max_position_embeddings)
        self.model, self.config = model, config
        self.vocab_size: int = model.config.vocab_size
        self.end_token_ids = frozenset(i for i in end_token_ids if i < self.vocab_size)
        self.scheduler = Scheduler(config)
        self.model_runner = ModelRunner(model)
        self.sampler = Sampler()
        self._sequences: dict[str, Sequence] = {}
        self._seeds = torch.Generator().manual_seed(config.seed)
        model.allocate_cache(self.scheduler.pool.num_blocks)

    def add_request(self, request_id: str, prompt_token_ids: Tokens[int], params: SamplingParams) -> None:
        """Queue a request. Everything that can be refused is refused here, before any work.

        Raises:
            ContextLengthError: the prompt leaves no room for a token in the context.
            RequestError: an empty prompt, an invalid token id, a request id in use, or too much asked for.
        """
        if request_id in self._sequences:
            raise RequestError("is in use", field="request_id", expected="a new one", found=request_id)
        self._check_prompt(prompt_token_ids)
        max_tokens = self.config.max_model_len - len(prompt_token_ids)
        if params.max_tokens is not None:
            max_tokens = min(max_tokens, params.max_tokens)
        self._check_params(params, max_tokens)
        builder = None
        if params.prompt_logprobs is not None:
            builder = PromptLogprobsBuilder(prompt_token_ids, params.prompt_logprobs, self.vocab_size)
        sequence = Sequence(
            request_id,
            prompt_token_ids,
            params,
            end_token_ids=self.end_token_ids,
            max_tokens=max_tokens,
            seed=self._next_seed() if params.seed is None else params.seed,
            prompt_logprobs=builder,
        )
        self._sequences[request_id] = sequence
        self.scheduler.add(sequence)

    def step(self) -> list[TokenOutput]:
        """Compute some tokens of some requests; what came of it, for requests that got a token."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        with single_torch_thread():
            logits = self.model_runner.run(batch)
            sampled = self.sampler.sample(logits, [item.sequence for item in batch if item.samples])
        outputs = self.scheduler.postprocess(batch, sampled)
        for output in outputs:
            if output.finish_reason is not None:
                del self._sequences[output.request_id]
        return outputs

    def abort_request(self, request_id: str) -> None:
        """Drop a request between steps; one that is unknown or finished is left alone."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence)

    def num_computed_tokens(self, request_id: str) -> int:
        """Tokens of an unfinished request that are in the cache."""
        return self._sequences[request_id].num_computed_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self._sequences)

    def close(self) -> None:
        """Drop all requests and free the model."""
        self._sequences.clear()
        self.scheduler.reset()
        self.model.close()

    def _next_seed(self) -> int:
        return int(torch.randint(MAX_SEED, (), generator=self._seeds))

    def _check_prompt(self, prompt_token_ids: Tokens[int]) -> None:
        if not prompt_token_ids:
            raise RequestError("is empty", field="prompt", expected="at least one token", found="none")
        if len(prompt_token_ids) >= self.config.max_model_len:
            raise ContextLengthError(len(prompt_token_ids), self.config.max_model_len)
        for token_id in prompt_token_ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                expected = f"integers in 0..{self.vocab_size - 1}"
                raise RequestError("invalid token id", field="prompt", expected=expected, found=token_id)

    def _check_params(self, params: SamplingParams, max_tokens: int) -> None:
        params.check_vocabulary(self.vocab_size)
        if params.logprobs == WHOLE_VOCABULARY:
            check_whole_vocabulary_size("logprobs", max_tokens, self.vocab_size)
        ends = self.end_token_ids.union(params.stop_token_ids or ())
        if (
            params.min_tokens
            and params.allowed_token_ids is not None
            and ends.issuperset(params.allowed_token_ids)
        ):
            raise RequestError(
                "nothing can be written: until min_tokens are, tokens that end the text are not allowed",
                field="allowed_token_ids",
                expected="a token that ends nothing",
                found=params.allowed_token_ids,
            )


def check_context(config: EngineConfig, limit: int) -> None:
    """Raise `ConfigError` if the context is longer than the ``limit`` tokens a model was made for."""
    if config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len (-c): expected at most the {limit} tokens the model was made for, "
            f"found {config.max_model_len}"
        )
