"""From logits to tokens.

Each row is handled on its own, with its own generator: a request gets the same tokens alone and in
any batch. The filters are those of vLLM, in its order.
"""

from __future__ import annotations

import math

import torch

from hybrid.engine.adjustments import adjustments_of
from hybrid.engine.logprobs import token_logprobs
from hybrid.engine.sequence import FailedSample, SampledToken, Sequence
from hybrid.errors import ModelError, RequestError
from hybrid.sampling_params import SamplingParams

TOP_P_FIRST_GUESS = 256  # candidates sorted first when only top_p limits them; widened until they hold it


class Sampler:
    """Chooses the next token of each sequence."""

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[SampledToken | FailedSample]:
        """One token for each row of float32 ``logits`` ``[n, vocab]`` and its sequence.

        A constraint that fails, or that allows nothing, fails its own sequence.

        Raises:
            ModelError: a row has no finite maximum: the model computed NaN or infinity.
        """
        return [self._sample_row(row, sequence) for row, sequence in zip(logits, sequences, strict=True)]

    def _sample_row(self, logits: torch.Tensor, sequence: Sequence) -> SampledToken | FailedSample:
        if not math.isfinite(logits.max()):
            raise ModelError(
                f"request {sequence.request_id!r}, position {len(sequence.token_ids)}: the logits are not "
                f"finite (maximum {float(logits.max())}): the model's file or its kernels are broken"
            )
        params = sequence.params
        try:
            adjusted = adjust_logits(logits, sequence)
        except Exception as error:
            if sequence.constraint is None:
                raise
            return FailedSample(error)
        if params.greedy:
            token_id = int(adjusted.argmax())
        else:
            token_id = draw(adjusted / params.temperature, params, sequence.generator)
        if params.logprobs is None:
            return SampledToken(token_id)
        logprobs = torch.log_softmax(logits, dim=-1)
        entries = token_logprobs(logprobs, token_id, params.logprobs)
        return SampledToken(token_id, float(logprobs[token_id]), entries)


def adjust_logits(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Everything that can change which token is the likeliest; returns ``logits`` itself if nothing does.

    Raises:
        RequestError: the sequence's constraint leaves nothing to choose.
    """
    params, kept = sequence.params, adjustments_of(sequence)
    result = _constrained(logits, sequence)
    if kept.allowed is not None:
        result = torch.full_like(logits, -math.inf).index_copy(0, kept.allowed, result[kept.allowed])
    if sequence.constraint is not None and result.max() == -math.inf:
        raise RequestError("the grammar allows no token here", field="structured_outputs")
    if sequence.num_output_tokens < params.min_tokens and len(kept.ends):
        going_on = result.index_fill(0, kept.ends, -math.inf)
        # A text that its grammar has completed ends before min_tokens.
        if sequence.constraint is None or going_on.max() > -math.inf:
            result = going_on
    if kept.bias is not None:
        result = result.index_add(0, *kept.bias)
    return _apply_penalties(result, sequence)


def _constrained(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    mask = None if sequence.constraint is None else sequence.constraint.allowed_mask()
    return logits if mask is None else logits.masked_fill(~mask, -math.inf)


def _apply_penalties(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    params, kept = sequence.params, adjustments_of(sequence)
    if params.repetition_penalty != 1.0:
        kept.seen.update(sequence.token_ids)
        values = logits[kept.seen.ids]
        penalised = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
        logits = logits.index_copy(0, kept.seen.ids, penalised)
    if (params.presence_penalty or params.frequency_penalty) and sequence.num_output_tokens:
        kept.written.update(sequence.token_ids, sequence.num_prompt_tokens)
        penalty = params.frequency_penalty * kept.written.counts + params.presence_penalty
        logits = logits.index_add(0, kept.written.ids, -penalty)
    return logits


def draw(scaled: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """A token from logits ``[vocab]`` divided by the temperature; takes one number from ``generator``."""
    probabilities, ids = candidates(scaled, params)
    cumulative = probabilities.double().cumsum(0)
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    position = int(torch.searchsorted(cumulative, threshold, right=True))
    return position if ids is None else int(ids[position])


def candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities and ids of the tokens that pass min_p, top_k and top_p.

    Probabilities are float32, descending, up to a common factor. Ids ``None`` mean the whole vocabulary in
    its own order. min_p and top_k both keep a prefix of the sorted tokens, so they become one count; top_p
    is then measured on what that prefix holds.
    """
    count = len(scaled) if params.top_k <= 0 else min(params.top_k, len(scaled))
    if params.min_p > 0:
        passing = scaled >= scaled.max() + math.log(params.min_p)
        count = min(count, int(passing.sum()))
    if count == len(scaled) and params.top_p == 1.0:
        return torch.softmax(scaled, dim=-1), None
    if params.top_p == 1.0:
        best = torch.topk(scaled, count)
        return torch.softmax(best.values, dim=-1), best.indices
    return _nucleus(scaled, count, params.top_p)


def _nucleus(scaled: torch.Tensor, count: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest prefix of the ``count`` best tokens that holds ``top_p`` of their probability."""
    whole = count == len(scaled)
    guess = min(count, TOP_P_FIRST_GUESS) if whole else count
    total = torch.logsumexp(scaled, dim=-1) if whole else None
    while True:
        best = torch.topk(scaled, guess)
        probabilities = torch.exp(best.values - (best.values.logsumexp(-1) if total is None else total))
        before = probabilities.double().cumsum(0) - probabilities
        kept = int((before < top_p).sum())
        if kept < guess or guess == count:
            return probabilities[:kept], best.indices[:kept]
        guess = min(count, guess * 8)
