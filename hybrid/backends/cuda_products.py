"""Products with weights on a GPU: the arithmetic of decoded tokens, and that of prompts.

Decoded tokens meet quantised weights as int8, rounded as the CPU rounds them (`quantize_activations`), and
float weights as float32. Prompts are rounded to a half type that tensor cores take, and weights to the same;
float32 weights, which routers have, meet float32. Either is the same bits for a token in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybrid.backends.cuda_weights import FloatMatrix, Matrix
from hybrid.kernels.gpu.combine import combine
from hybrid.kernels.gpu.formats import QuantizedMatrix
from hybrid.kernels.gpu.gemm import gemm, grouped_gemm
from hybrid.kernels.gpu.gemm_float import gemm_float
from hybrid.kernels.gpu.gemv import gemv
from hybrid.kernels.gpu.gemv_float import gemv_float
from hybrid.kernels.gpu.quantize_activations import quantize_activations
from hybrid.kernels.gpu.swiglu import swiglu

TOKENS_AT_ONCE = 2048  # of a prompt in feed-forward blocks, which bounds their working memory


def multiply_few(
    x: torch.Tensor, weights: Sequence[Matrix], ids: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Float32 products of decoded tokens ``[T, cols]`` with several matrices of the same columns.

    ``ids`` as in `hybrid.kernels.gpu.gemv.gemv`.
    """
    codes = None
    results = []
    for weight in weights:
        if isinstance(weight, FloatMatrix):
            results.append(gemv_float(x, weight.data, ids))
        else:
            codes = quantize_activations(x) if codes is None else codes
            results.append(gemv(*codes, weight, ids))
    return results


def multiply_many(
    x: torch.Tensor,
    weight: Matrix,
    half: torch.dtype,
    out_dtype: torch.dtype,
    topk_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of a prompt's ``[T, cols]``; ``topk_ids`` as in `hybrid.kernels.gpu.gemm.grouped_gemm`."""
    if isinstance(weight, FloatMatrix):
        kind = torch.float32 if weight.data.dtype is torch.float32 else half
        return gemm_float(x.to(kind), weight.data, topk_ids, out_dtype)
    if topk_ids is None:
        return gemm(x.to(half), weight, out_dtype)
    return grouped_gemm(x.to(half), weight, topk_ids, out_dtype)


def by_head(
    x: torch.Tensor, weight: Matrix, head_ids: torch.Tensor, half: torch.dtype | None
) -> torch.Tensor:
    """``[T, heads, cols]`` by a matrix for each head -> float32 ``[T, heads, rows]``.

    ``head_ids``: int32 ``[T * heads]``, the head of each row. ``half`` is the type of prompts; ``None``:
    tokens are decoded.
    """
    tokens, heads, cols = x.shape
    flat = x.contiguous().view(tokens * heads, cols)
    if half is None:
        (out,) = multiply_few(flat, [weight], head_ids)
    else:
        out = multiply_many(flat, weight, half, torch.float32, head_ids[:, None])
    return out.view(tokens, heads, weight.rows)


def mlp_few(x: torch.Tensor, gate: Matrix, up: Matrix, down: Matrix) -> torch.Tensor:
    """A dense SwiGLU block for decoded tokens."""
    (out,) = multiply_few(swiglu(*multiply_few(x, (gate, up))), [down])
    return out


def mlp_many(x: torch.Tensor, gate: Matrix, up: Matrix, down: Matrix, half: torch.dtype) -> torch.Tensor:
    """The same for a prompt."""
    pieces = []
    for start in range(0, len(x), TOKENS_AT_ONCE):
        piece = x[start : start + TOKENS_AT_ONCE]
        hidden = swiglu(multiply_many(piece, gate, half, half), multiply_many(piece, up, half, half))
        pieces.append(multiply_many(hidden, down, half, torch.float32))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def moe_few(
    x: torch.Tensor, stacks: tuple[Matrix, Matrix, Matrix], ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Routed experts of decoded tokens: each slot reads the matrices of its expert."""
    gate, up, down = stacks
    slots = ids.flatten()
    (parts,) = multiply_few(swiglu(*multiply_few(x, (gate, up), slots)), [down], slots)
    return combine(parts, weights)


def moe_many(
    x: torch.Tensor,
    stacks: tuple[Matrix, Matrix, Matrix],
    ids: torch.Tensor,
    weights: torch.Tensor,
    half: torch.dtype,
) -> torch.Tensor:
    """Routed experts of a prompt: slots sorted by expert."""
    gate, up, down = stacks
    pieces = []
    for start in range(0, len(x), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        rows, chosen = x[part], ids[part]
        hidden = swiglu(
            multiply_many(rows, gate, half, half, chosen), multiply_many(rows, up, half, half, chosen)
        )
        outputs = multiply_many(hidden, down, half, torch.float32, chosen.reshape(-1, 1))
        pieces.append(combine(outputs, weights[part]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def matrix_of_heads(weight: Matrix) -> QuantizedMatrix | torch.Tensor:
    """What `hybrid.kernels.gpu.transposed.transposed` takes."""
    return weight.data if isinstance(weight, FloatMatrix) else weight
