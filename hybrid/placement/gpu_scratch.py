"""Working memory of the GPU backend: the most bytes of tensors alive at once, estimated
from what its operations take. Small tensors (sorting slots, ids, batches) are counted in the rough; the first
steps of a run take the real ones, see `hybrid.models.warm_up`.

``half`` is the bytes of a number in a prompt's products: 2, or 4 in the interpreter, where nothing is copied
to another type.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hybrid.placement.dimensions import Dimensions
from hybrid.placement.scratch import Step

TOKENS_AT_ONCE = 2048  # of `hybrid.backends.cuda_products`
MOST_CAPTURED_SEQS = 16  # of `hybrid.models.hybrid_step`
_KEY_SPLIT = 512
_ALIGN_BYTES = 64  # of a slot, while slots are sorted by expert or head


def activation_bytes(
    dims: Dimensions, step: Step, roles: Collection[str], widths: Mapping[str, int], half: int = 2
) -> int:
    """Of a prompt's largest step.

    Args:
        widths: rows of a ``dense_ffn`` and of a ``shared_experts`` gate, as far as they are there.
    """
    stream = 4 * dims.hidden_size * step.num_tokens
    most = [2 * stream + 4 * step.num_logits * (dims.vocab_size + dims.hidden_size)]
    if "attention" in roles:
        most.append(2 * stream + _attention(dims, step, half))
    if "routed_experts" in roles:
        width, k = dims.expert_width, dims.num_experts_per_tok
        most.append(2 * stream + _feed_forward(dims, step, width, k, half))
    routed = stream if "shared_experts" in widths else 0
    most += [2 * stream + routed + _feed_forward(dims, step, width, 1, half) for width in widths.values()]
    return max(most)


def captured_bytes(dims: Dimensions, num_seqs: int, cache_tokens: int) -> int:
    """Of decode steps: each number of sequences has a captured step that keeps its own memory, most of it for
    the splits of attention over a cache that is all one sequence's."""
    splits = -(-cache_tokens // _KEY_SPLIT)
    of_one = 4 * dims.num_heads * splits * (dims.kv_lora_rank + 2)
    most = min(num_seqs, MOST_CAPTURED_SEQS)
    return of_one * max(most * (most + 1) // 2, num_seqs)


def _attention(dims: Dimensions, step: Step, half: int) -> int:
    tokens, rows, copied = step.num_tokens, step.num_tokens * dims.num_heads, half if half < 4 else 0
    kept = 4 * rows * dims.head_dim + 4 * tokens * (dims.q_lora_rank + dims.cache_width)
    latent = rows * dims.kv_lora_rank
    # Queries, their copies, the result and its copy; with several prompts their parts before they are joined.
    attending = latent * (4 + 4 + 2 * copied) + copied * rows * dims.rope_dim
    attending += half * latent if step.num_logits > 1 else 0
    projecting = latent * (4 + 4 + copied) + 4 * rows * dims.v_head_dim + _ALIGN_BYTES * rows
    return kept + max(attending, projecting)


def _feed_forward(dims: Dimensions, step: Step, width: int, k: int, half: int) -> int:
    tokens = min(step.num_tokens, TOKENS_AT_ONCE)
    slots, out = tokens * k, 4 * tokens * dims.hidden_size
    inside = 3 * half * slots * width
    # Outputs of the experts and their sum.
    last = half * slots * width + 4 * slots * dims.hidden_size + (out if k > 1 else 0)
    pieces = 4 * step.num_tokens * dims.hidden_size if step.num_tokens > tokens else 0
    return max(inside, last) + (_ALIGN_BYTES * slots if k > 1 else 0) + 2 * pieces
