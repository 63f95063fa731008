"""Plain dequantisation of the IQ formats with a code book, from the blocks of the file; see
`dequantize_torch`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from hybrid.kernels.gpu.codebooks import iq1_trits, magnitudes

_Pair = tuple[torch.Tensor, torch.Tensor]


def _half(b: torch.Tensor, at: int) -> torch.Tensor:
    return b[:, at : at + 2].flatten().clone().view(torch.float16).float()[:, None]


def _number(b: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Unsigned numbers of two or four bytes."""
    return b.flatten().clone().view(kind).long().reshape(len(b), -1) & ((1 << 8 * kind.itemsize) - 1)


def _fields(values: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """``[n, k] -> [n, k, count]``, the lowest first."""
    return values.long()[..., None] >> (width * torch.arange(count, device=values.device)) & (
        (1 << width) - 1
    )


def _eight_signs(signs: torch.Tensor) -> torch.Tensor:
    """The sign bytes ``[n, 32]`` to factors ``[n, 256]``."""
    return 1.0 - 2.0 * _fields(signs, 1, 8).float().flatten(1)


def _seven_signs(signs: torch.Tensor) -> torch.Tensor:
    """Fields of seven bits, to which an eighth makes the number of ones even."""
    return _eight_signs(signs.long() | (_fields(signs, 1, 7).sum(-1) & 1) << 7)


def _weights(name: str, index: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor) -> _Pair:
    """``scales``: ``[n, k]``, each for 256 / k columns."""
    grid = magnitudes(name).to(index.device)[index].float().flatten(1)
    values = scales.repeat_interleave(256 // scales.shape[1], 1) * grid * signs
    return values, torch.zeros((), device=index.device)


def _iq2_xxs(b: torch.Tensor) -> _Pair:
    words = _number(b[:, 2:], torch.int32).reshape(len(b), 8, 2)
    scales = _half(b, 0) * (0.5 + (words[..., 1] >> 28).float()) * 0.25
    index = _fields(words[..., 0], 8, 4).flatten(1)
    return _weights("IQ2_XXS", index, _seven_signs(_fields(words[..., 1], 7, 4).flatten(1)), scales)


def _nibble_scales(d: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return d * (0.5 + _fields(scales, 4, 2).float().flatten(1)) * 0.25


def _iq2_xs(b: torch.Tensor) -> _Pair:
    q = _number(b[:, 2:66], torch.int16)
    return _weights("IQ2_XS", q & 511, _seven_signs(q >> 9), _nibble_scales(_half(b, 0), b[:, 66:]))


def _iq2_s(b: torch.Tensor) -> _Pair:
    index = b[:, 2:34].long() | _fields(b[:, 66:74], 2, 4).flatten(1) << 8
    return _weights("IQ2_S", index, _eight_signs(b[:, 34:66]), _nibble_scales(_half(b, 0), b[:, 74:]))


def _iq3_xxs(b: torch.Tensor) -> _Pair:
    words = _number(b[:, 66:], torch.int32)
    scales = _half(b, 0) * (0.5 + (words >> 28).float()) * 0.5
    return _weights("IQ3_XXS", b[:, 2:66].long(), _seven_signs(_fields(words, 7, 4).flatten(1)), scales)


def _iq3_s(b: torch.Tensor) -> _Pair:
    index = b[:, 2:66].long() | _fields(b[:, 66:74], 1, 8).flatten(1) << 8
    scales = _half(b, 0) * (1 + 2 * _fields(b[:, 106:], 4, 2).flatten(1)).float()
    return _weights("IQ3_S", index, _eight_signs(b[:, 74:106]), scales)


def _iq1(index: torch.Tensor, scales: torch.Tensor, negative: torch.Tensor) -> _Pair:
    """``scale * (trit - 1 + delta)``, delta 1/8 or -1/8: less ``scale * (1 - delta)``. All of it is exact."""
    trits = iq1_trits(index.device)[index].float().flatten(1)
    scales, negative = (v.repeat_interleave(256 // v.shape[1], 1) for v in (scales, negative))
    return scales * trits, scales * torch.where(negative == 0, 0.875, 1.125)


def _iq1_s(b: torch.Tensor) -> _Pair:
    qh = _number(b[:, 34:], torch.int16)
    index = b[:, 2:34].long() | _fields(qh, 3, 4).flatten(1) << 8
    return _iq1(index, _half(b, 0) * (2 * (qh >> 12 & 7) + 1).float(), qh >> 15)


def _iq1_m(b: torch.Tensor) -> _Pair:
    nibbles = _fields(b[:, 32:48], 4, 2).flatten(1)
    words = _number(b[:, 48:], torch.int16)
    d = ((words >> 12) << (4 * torch.arange(4, device=b.device))).sum(1, keepdim=True)
    d = torch.where(d >= 1 << 15, d - (1 << 16), d).to(torch.int16).view(torch.float16).float()
    scales = d * (2 * _fields(words, 3, 4).flatten(1) + 1).float()
    return _iq1(b[:, :32].long() | (nibbles & 7) << 8, scales, nibbles >> 3)


CODEBOOK_BLOCKS: dict[str, Callable[[torch.Tensor], _Pair]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}
