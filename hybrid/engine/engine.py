"""The engine: requests of token ids in, tokens out, one step at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens

import torch

from hybrid.config import BLOCK_SIZE, EngineConfig
from hybrid.engine.constraint import Constraint, ConstraintFactory
from hybrid.engine.logprobs import PromptLogprobsBuilder, check_whole_vocabulary_size
from hybrid.engine.model_runner import CausalLM, ModelRunner
from hybrid.engine.sampler import Sampler
from hybrid.engine.scheduler import Scheduler
from hybrid.engine.sequence import FailedRequest, Sequence, TokenOutput
from hybrid.engine.stats import EngineStats
from hybrid.engine.torch_threads import single_torch_thread
from hybrid.errors import ConfigError, ContextLengthError, RequestError
from hybrid.sampling_params import MAX_SEED, WHOLE_VOCABULARY, SamplingParams


class Engine:
    """Owns the model, its cache and the running requests. Knows token ids only, and no text.

    Not thread-safe, but for `prepare`. ``end_token_ids`` are the model's own end tokens;
    ``constraint_factory`` makes the grammars of structured output.

    Raises:
        ConfigError: ``max_model_len`` is more than the model was made for.
    """

    def __init__(
        self,
        model: CausalLM,
        config: EngineConfig,
        *,
        end_token_ids: frozenset[int] = frozenset(),
        constraint_factory: ConstraintFactory | None = None,
    ) -> None:
        check_context(config, model.config.max_position_embeddings)
        self.model, self.config = model, config
        self.vocab_size: int = model.config.vocab_size
        self.end_token_ids = frozenset(i for i in end_token_ids if i < self.vocab_size)
        self.scheduler = Scheduler(config)
        self.model_runner = ModelRunner(model)
        self.sampler = Sampler()
        self._constraint_factory = constraint_factory
        self.interrupted: Callable[[], bool] = lambda: False  # asked between parts of a prompt's layers
        self._open: dict[str, dict[int, Sequence]] = {}  # request -> its unfinished texts
        self._num_requests = 0
        self._seeds = torch.Generator().manual_seed(config.seed)
        model.allocate_cache(self.scheduler.pool.num_blocks)

    def prepare(self, request_id: str, prompt_token_ids: Tokens[int], params: SamplingParams) -> Sequence:
        """The first text of a request to `add`, its siblings attached.

        Everything that can be refused is refused here, before any work. Any thread may call it. Grammars of
        structured output are compiled here, which can take long.

        Raises:
            ContextLengthError: the prompt leaves no room for a token in the context.
            RequestError: an empty prompt, an invalid token id, or too much asked for.
        """
        self._check_prompt(prompt_token_ids)
        max_tokens = self.config.max_model_len - len(prompt_token_ids)
        if params.max_tokens is not None:
            max_tokens = min(max_tokens, params.max_tokens)
        self._check_params(params, max_tokens)
        builder = None
        if params.prompt_logprobs is not None:
            builder = PromptLogprobsBuilder(prompt_token_ids, params.prompt_logprobs, self.vocab_size)
        texts = [
            Sequence(
                request_id,
                prompt_token_ids,
                params,
                end_token_ids=self.end_token_ids,
                max_tokens=max_tokens,
                prompt_logprobs=None if index else builder,
                constraint=self._constraint(params),
                index=index,
            )
            for index in range(params.n)
        ]
        texts[0].siblings = texts[1:]
        texts[0].reusable_keys()  # computed here, not on the engine's thread
        return texts[0]

    def add(self, sequence: Sequence) -> None:
        """Queue a prepared request.

        Raises:
            RequestError: its id is in use.
        """
        if sequence.request_id in self._open:
            raise RequestError(
                "is in use", field="request_id", expected="a new one", found=sequence.request_id
            )
        seed = self._next_seed() if sequence.params.seed is None else sequence.params.seed
        self._num_requests += 1
        texts = [sequence, *sequence.siblings]
        for text in texts:
            text.seed(seed)
            text.arrival = (self._num_requests, text.index)
        self._open[sequence.request_id] = {text.index: text for text in texts}
        self.scheduler.counters.prompt_tokens_total += sequence.num_prompt_tokens
        self.scheduler.add(sequence)

    def add_request(self, request_id: str, prompt_token_ids: Tokens[int], params: SamplingParams) -> None:
        """`prepare` and `add`; raises what they do."""
        self.add(self.prepare(request_id, prompt_token_ids, params))

    def step(self) -> list[TokenOutput | FailedRequest]:
        """Compute some tokens of some requests; what came of it, for requests that got a token.

        There is nothing yet when it returns between two layers of a prompt, see `interrupted` and `Turns`.
        """
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        started = time.perf_counter()
        with single_torch_thread():
            logits = self.model_runner.run(batch, self._must_pause)
            sampled = None if logits is None else self.sampler.sample(logits, batch.samplers)
        self.scheduler.count(batch, time.perf_counter() - started, finished=sampled is not None)
        if sampled is None:
            return []
        outputs = self.scheduler.postprocess(batch, sampled)
        self._copy_blocks()
        for output in outputs:
            self._close_ended(output)
        return outputs

    def abort_request(self, request_id: str) -> None:
        """Drop a request between steps; one that is unknown or finished is left alone."""
        for sequence in self._open.pop(request_id, {}).values():
            self.scheduler.finish(sequence)

    def abort_text(self, request_id: str, index: int) -> None:
        """Drop one text of a request; one that is unknown or finished is left alone."""
        texts = self._open.get(request_id, {})
        sequence = texts.pop(index, None)
        if sequence is not None:
            self.scheduler.finish(sequence)
        if not texts:
            self._open.pop(request_id, None)

    def sequences_in_prompt(self) -> list[Sequence]:
        """Those of whose prompt some is computed, and some is not."""
        return [
            s
            for s in self.scheduler.running
            if not s.index and 0 < s.num_computed_tokens < s.num_prompt_tokens and not s.num_output_tokens
        ]

    def stats(self, num_requests_running: int, num_requests_waiting: int) -> EngineStats:
        """Any thread may call it."""
        pool, copies = self.scheduler.pool, self.model.copy_stats
        return EngineStats(
            num_requests_running=num_requests_running,
            num_requests_waiting=num_requests_waiting,
            kv_cache_usage=1 - pool.num_free / pool.num_blocks,
            kv_cache_tokens=pool.num_blocks * BLOCK_SIZE,
            expert_cpu_seconds_total=self.model.expert_cpu_seconds,
            expert_cache_uses_total=None if copies is None else copies.uses,
            expert_cache_hits_total=None if copies is None else copies.hits,
            expert_cache_copies_total=None if copies is None else copies.copies,
            h2d_bytes_total=None if copies is None else copies.n_bytes,
            **vars(self.scheduler.counters),
        )

    def has_unfinished_requests(self) -> bool:
        return bool(self._open)

    def close(self) -> None:
        """Drop all requests and free the model."""
        self._open.clear()
        self.scheduler.reset()
        self.model.close()

    def _copy_blocks(self) -> None:
        if self.scheduler.copies:
            self.model.copy_blocks(self.scheduler.copies)
            self.scheduler.copies = []

    def _must_pause(self, kind: str) -> bool:
        time_is_up = self.scheduler.turns.prompt_is_over(kind)
        return self.interrupted() or time_is_up

    def _close_ended(self, output: TokenOutput | FailedRequest) -> None:
        if isinstance(output, FailedRequest):
            self.abort_request(output.request_id)
        elif output.finish_reason is not None:
            self.abort_text(output.request_id, output.index)

    def _next_seed(self) -> int:
        return int(torch.randint(MAX_SEED, (), generator=self._seeds))

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        wanted: object = params.structured_outputs
        if wanted is None:
            return None
        if self._constraint_factory is None:
            raise RequestError("this engine has no grammars", field="structured_outputs")
        return self._constraint_factory(wanted)

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
            check_whole_vocabulary_size("logprobs", max_tokens * params.n, self.vocab_size)
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
