"""Keys of cache blocks: what a block holds follows from its tokens and all before them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from hybrid.kvcache.blocks import BLOCK_SIZE

_KEY_BYTES = 16


class BlockKeys:
    """Keys of the full blocks of a growing text.

    Each is a BLAKE2 digest of the key before it and the block's token ids: nobody can make two texts meet on
    purpose, and 2**64 blocks would do so by chance.
    """

    def __init__(self, known: Sequence[bytes] = ()) -> None:
        self._keys = list(known)

    def first(self, count: int, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the first ``count`` blocks of ``token_ids``, which only ever grows at its end."""
        for index in range(len(self._keys), count):
            tokens = array("i", token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
            before = self._keys[-1] if index else b""
            self._keys.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=_KEY_BYTES).digest())
        return self._keys[:count]
