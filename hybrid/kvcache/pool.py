"""Which cache blocks are free, which are shared, and which still hold something worth keeping."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from hybrid.kvcache.blocks import BLOCK_SIZE


class BlockPool:
    """Ids of the blocks of a cache of ``num_blocks``. The cache itself belongs to the model.

    A block is in use while something refers to it. One that was published under a key keeps its content when
    it falls free, until it is needed: after all that hold nothing known, the least recently used goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references: list[int] = []
        self._empty: deque[int] = deque()
        self._kept: OrderedDict[int, None] = OrderedDict()  # free and published, least recently used first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.reset()

    @property
    def num_free(self) -> int:
        """Blocks nothing refers to, whatever they hold."""
        return len(self._empty) + len(self._kept)

    def reset(self) -> None:
        """Make every block free and forget what it holds."""
        self._references = [0] * self.num_blocks
        self._empty = deque(range(self.num_blocks))
        self._kept.clear()
        self._key_of.clear()
        self._block_of.clear()

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks until ``block_table`` holds ``num_tokens``; False, unchanged, if too few are free."""
        missing = blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        block_table.extend(self._take() for _ in range(missing))
        return True

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block, in use or kept."""
        for block in blocks:
            if not self._references[block]:
                del self._kept[block]
            self._references[block] += 1

    def release(self, block_table: list[int]) -> None:
        """Take a reference from all blocks of ``block_table`` and empty it."""
        for block in reversed(block_table):  # the end of a text is worth less than its beginning
            self._references[block] -= 1
            if not self._references[block]:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)
        block_table.clear()

    def publish(self, block: int, key: bytes) -> None:
        """Let `find` know what a block in use holds. Where another one holds the same, that one stays."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key], self._key_of[block] = block, key

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the first keys, up to the first that is not there. They can be taken by `share`."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """What `num_free` would be once these blocks were shared."""
        return self.num_free - sum(block in self._kept for block in blocks)

    def _take(self) -> int:
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._references[block] = 1
        return block


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens``."""
    return -(-num_tokens // BLOCK_SIZE)
