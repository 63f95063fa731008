"""The code books of IQ formats as device tables, and those of IQ1 as trits.

The entries are those of the CPU kernels (kernels/cpu/codebooks.h). A table is made on a device at its first
use, so that a captured graph must not be the first to use a format.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from hybrid.kernels import cpu

NUM_ENTRIES = {"IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512}
_IQ2_MAGNITUDES = (8, 25, 43)


@lru_cache(maxsize=64)
def table(name: str, device: torch.device) -> torch.Tensor:
    """Int32 ``[entries]``, what `decode_codebook` looks up: of IQ2 eight nibbles, each the place of a
    magnitude among 8, 25 and 43, that of column ``c`` at bit ``4 * c``; of IQ3 four magnitudes as bytes.
    """
    if device.type == "meta":
        return torch.empty(NUM_ENTRIES[name], dtype=torch.int32, device=device)
    entries = magnitudes(name)
    if entries.shape[1] == 4:
        return entries.to(torch.uint8).view(torch.int32).flatten().to(device)
    places = torch.bucketize(entries.long(), torch.tensor(_IQ2_MAGNITUDES))
    words = (places << (4 * torch.arange(8))).sum(1)
    return words.to(torch.int32).to(device)


@lru_cache(maxsize=8)
def magnitudes(name: str) -> torch.Tensor:
    """Int8 ``[entries, 8]`` of an IQ2 format, ``[entries, 4]`` of an IQ3 format."""
    width = 8 if name.startswith("IQ2") else 4
    return torch.frombuffer(bytearray(cpu.code_book(name)), dtype=torch.int8).reshape(-1, width)


@lru_cache(maxsize=4)
def iq1_trits(device: torch.device) -> torch.Tensor:
    """Uint8 ``[2048, 8]``: the weights of IQ1's entries plus one."""
    entries = torch.frombuffer(bytearray(cpu.code_book("IQ1_S")), dtype=torch.int8).reshape(2048, 8)
    return (entries // 8 + 1).to(torch.uint8).to(device)


@lru_cache(maxsize=4)
def iq1_entries(device: torch.device) -> torch.Tensor:
    """Int16 ``[6561]``: the entry whose trits are the digits of a number, the first the highest; or -1."""
    numbers = (iq1_trits(torch.device("cpu")).long() * 3 ** torch.arange(7, -1, -1)).sum(1)
    found = torch.full((6561,), -1, dtype=torch.int16)
    found[numbers] = torch.arange(2048, dtype=torch.int16)
    return found.to(device)
