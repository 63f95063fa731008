"""Working memory of the CPU kernels and of a step's activations, counted as the code takes it.

The kernels' part mirrors what each operation of `kernels/cpu` takes from its `Scratch`, and how that grows:
a test compares it with what a run holds. Routing decides how many tokens an expert gets; the plan assumes
the most.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from hybrid.placement.dimensions import Dimensions

_MIB = 1 << 20
_HUGE_PAGE = 2 * _MIB
_ACT_BLOCK = 256
_MOST_TILE_TOKENS = 128
_TILE_WORTHWHILE = 8
_FEW_PAIRS = 64
_MOE_CHUNK_BYTES = 128 * _MIB
_MOE_SLICE_BYTES = 64 * _MIB
_KEY_SPLIT = 512
_ROWS_PER_UNIT = 128
_LANES, _KEY_BLOCK, _PANEL = 16, 128, 64
_PANEL_STRIDE = _KEY_BLOCK * _PANEL + _PANEL
_VALUE_STRIDE = _KEY_BLOCK * _LANES + _LANES * 2
_MOST_STATE_FLOATS = 8 << 20
_ABSORB_TOKENS = 64


@dataclass(frozen=True)
class Step:
    """The largest step of a run: its tokens, those in the cache, and the logits it makes. ``num_slices`` are
    the parts into which feed-forward blocks are cut, whose partial sums are kept apart, ``number_bytes``
    those of a number that attention multiplies: a float of an f32 cache, otherwise a word."""

    num_tokens: int
    context: int
    num_logits: int
    num_threads: int
    num_slices: int = 1
    number_bytes: int = 2


def kernel_bytes(
    dims: Dimensions, step: Step, roles: Collection[str], widths: Mapping[str, int], joint_kv_b: bool
) -> int:
    """Bytes the kernels hold after steps of this size, for tensors of these roles on the CPU.

    Args:
        widths: rows of a ``dense_ffn`` and of a ``shared_experts`` gate, as far as they are there.
        joint_kv_b: keys and values come from one tensor, which is multiplied transposed.
    """
    outer, routing = _Scratch(), _Scratch()
    # The second time finds what the first left: one chunk that holds the largest use.
    for tokens in (step.num_tokens, step.num_tokens, 1, 1):
        for takes in _layer(dims, step, tokens, roles, widths, joint_kv_b):
            outer.run(takes)
        if "router" in roles:
            routing.run(_route(dims, tokens, step.num_threads))
    return outer.total + routing.total


def activation_bytes(dims: Dimensions, step: Step, attends: bool) -> int:
    """The most bytes of tensors alive at once in a step, in a layer or where logits are made."""
    hidden = dims.hidden_size
    layer = 5 * hidden
    if attends:
        heads = dims.num_heads * (dims.head_dim + 2 * dims.kv_lora_rank + dims.v_head_dim)
        layer = 4 * hidden + (dims.q_lora_rank or hidden) + dims.cache_width + heads
    logits = step.num_logits * (dims.vocab_size + hidden) + 2 * step.num_tokens * hidden
    return 4 * max(step.num_tokens * layer, logits)


def rope_bytes(dims: Dimensions, max_model_len: int) -> int:
    """The table of cosines and sines."""
    return max_model_len * dims.rope_dim * 4


@dataclass
class _Scratch:
    """Grows by chunks; when an operation begins and there are several, they become one of their sum."""

    chunks: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.chunks)

    def run(self, takes: Iterable[int]) -> None:
        if len(self.chunks) > 1:
            self.chunks = [_chunk(self.total)]
        used = 0
        for n_bytes in takes:
            rounded = (n_bytes // 64 + 1) * 64
            if not self.chunks or self.chunks[-1] - used < rounded:
                self.chunks.append(_chunk(rounded))
                used = 0
            used += rounded


def _chunk(n_bytes: int) -> int:
    return _round_up(n_bytes, _MIB if n_bytes < _HUGE_PAGE else _HUGE_PAGE)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _layer(
    dims: Dimensions,
    step: Step,
    tokens: int,
    roles: Collection[str],
    widths: Mapping[str, int],
    joint_kv_b: bool,
) -> Iterator[list[int]]:
    """The takes of each operation of a layer, in their order."""
    threads, hidden, slices = step.num_threads, dims.hidden_size, step.num_slices
    if "attention" in roles:
        yield from _attention_block(dims, step, tokens, joint_kv_b)
    if "dense_ffn" in widths:
        yield _moe(tokens, 1, 1, hidden, widths["dense_ffn"], threads, slices)
    if "router" in roles:
        yield _linear(tokens, hidden, 1, threads)
    if "routed_experts" in roles:
        count = dims.num_experts_per_tok
        yield _moe(tokens, count, dims.num_experts, hidden, dims.expert_width, threads, slices)
    if "shared_experts" in widths:
        yield _moe(tokens, 1, 1, hidden, widths["shared_experts"], threads, slices)
    if step.num_logits:
        yield _linear(min(tokens, step.num_logits), hidden, 1, threads)


def _attention_block(dims: Dimensions, step: Step, tokens: int, joint_kv_b: bool) -> Iterator[list[int]]:
    threads, heads, hidden, latent = step.num_threads, dims.num_heads, dims.hidden_size, dims.kv_lora_rank
    yield _linear(tokens, hidden, 1, threads)
    if dims.q_lora_rank:
        yield _linear(tokens, dims.q_lora_rank, 1, threads)
    yield [threads * _round_up(dims.cache_width, 16) * 4]
    if joint_kv_b:
        sizes = [16 * _ACT_BLOCK, _ABSORB_TOKENS * dims.nope_dim, _ABSORB_TOKENS * _ACT_BLOCK]
        yield [24 * threads] + [size * 4 for size in sizes] * threads
    else:
        yield _linear(tokens, dims.nope_dim, heads, threads)
    yield _attention(dims, step, tokens)
    yield _linear(tokens, latent, heads, threads)
    yield _linear(tokens, heads * dims.v_head_dim, 1, threads)


def _rows(count: int, cols: int) -> list[int]:
    """`QuantizedRows`: codes, scales, sums."""
    stride = _round_up(cols, 64)
    return [count * stride, count * -(-cols // _ACT_BLOCK) * 4, count * stride // 16 * 2]


def _tiles(workers: int, tokens: int, cols: int) -> list[int]:
    """`TokenTiles`: the same, for one tile of each worker."""
    rows = -(-cols // _ACT_BLOCK) * _round_up(min(tokens, _MOST_TILE_TOKENS), 4)
    return [workers * rows * _ACT_BLOCK, workers * rows * 4, workers * rows * 32]


def _linear(tokens: int, cols: int, batch: int, threads: int) -> list[int]:
    fit = (256 << 10) // max(cols, 1) // 16 * 16
    block = min(tokens, min(max(fit, 16), _MOST_TILE_TOKENS))
    tiled = threads if block >= _TILE_WORTHWHILE else 0
    return _rows(tokens * batch, cols) + _tiles(tiled, block, cols)


def _moe(tokens: int, k: int, experts: int, hidden: int, width: int, threads: int, slices: int) -> list[int]:
    tokens = min(tokens, max(_MOST_TILE_TOKENS, _MOE_CHUNK_BYTES // (2 * hidden + k * width * 2)))
    slots = tokens * k
    shares = experts + slots // _MOST_TILE_TOKENS + 1
    most = min(tokens, _MOST_TILE_TOKENS)
    tiled = threads if most >= _TILE_WORTHWHILE else 0
    plain, blocks = _round_up(width, 16), -(-width // _ACT_BLOCK)
    takes = [(experts + 1) * 4, shares * 12, slots * 4, slots * 4]
    takes += _rows(tokens, hidden) + _rows(slots, width)
    rows = _unit_rows(width, min(slots, experts), threads)
    if rows < _ACT_BLOCK:
        takes += [slots * plain * 4, min(slots, experts) * blocks * 4]
    takes += [2 * _MOST_TILE_TOKENS * rows * threads * 4, *_tiles(tiled, most, hidden)]
    if slots <= _FEW_PAIRS and slices == 1:
        takes += [slots * _unit_rows(hidden, 1, threads) * threads * 4]
    else:
        affordable = _MOE_SLICE_BYTES // 4 // (slots * slices) // _ACT_BLOCK * _ACT_BLOCK
        takes += [slices * slots * min(_round_up(hidden, 16), max(_ACT_BLOCK, affordable)) * 4]
    takes += [k * slices * threads * 8] + ([k * slices * threads * 4] if slices > 1 else [])
    return [*takes, *_tiles(tiled, most, width)]


def _unit_rows(rows: int, others: int, threads: int) -> int:
    taken = _ACT_BLOCK
    while taken > 16 and -(-rows // taken) * others < 4 * threads:
        taken //= 2
    return taken


def _attention(dims: Dimensions, step: Step, tokens: int) -> list[int]:
    """As `kernels/cpu/flash_attention.cc`, of one sequence whose last tokens these are."""
    heads, threads, number = max(dims.num_heads, 1), step.num_threads, step.number_bytes
    panels = -(-dims.kv_lora_rank // _PANEL) + -(-dims.rope_dim // _PANEL)
    columns = _round_up(dims.kv_lora_rank, 32)
    state = (2 + columns) * _LANES
    together = min(heads, _ROWS_PER_UNIT)
    block = max(1, _ROWS_PER_UNIT // together)
    first = max(step.context - tokens, 0)
    splits = [(first + min(t + block, tokens) - 1) // _KEY_SPLIT + 1 for t in range(0, tokens, block)]
    most = min(block, tokens)

    def kept_floats(together: int) -> int:
        return sum(splits) * -(-heads // together) * -(-most * together // _LANES) * state

    apart = kept_floats(together) <= _MOST_STATE_FLOATS
    units = sum(splits) if apart else len(splits)
    while units * -(-heads // together) < 4 * threads and together >= 2 * _LANES:
        together = _round_up(-(-together // 2), _LANES)
    groups = -(-most * together // _LANES)
    takes = [tokens * 24] + ([kept_floats(together) * 4] if apart else []) + [units * 12, 128 * threads]
    worker = [panels * _PANEL_STRIDE * number, columns // 16 * _VALUE_STRIDE * number]
    worker += [groups * panels * _PANEL * _LANES * number, _KEY_BLOCK * _LANES * number]
    worker += [_KEY_BLOCK * 4, groups * _LANES * 4] * 2 + [_KEY_BLOCK * 4, _KEY_BLOCK * _LANES * 4]
    worker += [_LANES * 4] * 3 + [groups * state * 4] * (1 if apart else 2)
    return takes + worker * threads


def _route(dims: Dimensions, tokens: int, threads: int) -> list[int]:
    return [tokens * dims.num_experts * 4, 40 * threads] + [dims.num_experts * 4] * 4 * threads
