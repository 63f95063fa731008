"""Which cache blocks are free."""

from __future__ import annotations

from collections import deque

from hybrid.kvcache.blocks import BLOCK_SIZE


class BlockPool:
    """Ids of the blocks of a cache of ``num_blocks``. The cache itself belongs to the model."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque()
        self.reset()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def reset(self) -> None:
        """Make every block free."""
        self._free = deque(range(self.num_blocks))

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks until ``block_table`` holds ``num_tokens``; False, unchanged, if too few are free."""
        missing = blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        block_table.extend(self._free.popleft() for _ in range(missing))
        return True

    def release(self, block_table: list[int]) -> None:
        """Return all blocks of ``block_table`` and empty it."""
        self._free.extend(block_table)
        block_table.clear()


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens``."""
    return -(-num_tokens // BLOCK_SIZE)
