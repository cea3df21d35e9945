"""Who has which part of the cache, and which beginnings of sequences lie in it already.

The cache is cut into blocks of 16 keys, as vLLM cuts it (Kwon et al. 2023). A full block of a
prompt is known by its tokens and by those before them; a prompt that begins with them has the same
block. A block that nobody has keeps what is in it until its place is needed.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BLOCK_TOKENS = 16


def blocks_for(keys: int) -> int:
    """How many blocks hold so many keys."""
    return -(-keys // BLOCK_TOKENS)


def slots_of(blocks: Sequence[int], keys: int) -> np.ndarray:
    """Where the first keys of a sequence with these blocks are: (keys,) int32."""
    offsets = np.arange(BLOCK_TOKENS, dtype=np.int32)
    return (np.array(blocks, np.int32)[:, None] * BLOCK_TOKENS + offsets).ravel()[:keys]


class BlockPool:
    """The blocks of a cache. Block 0 is nobody's: rows that are left out of a step write there."""

    def __init__(self, blocks: int):
        """`blocks`: of the cache, with block 0."""
        assert blocks > 1, f"{blocks}"
        self.capacity = blocks - 1  # blocks that can be had
        self._owners = [0] * blocks
        self._free = OrderedDict.fromkeys(range(1, blocks))  # the next to be taken first
        # What a block holds is a number; it is found by that of the block before it, and its own
        # tokens. A number is given once: what followed a block that is overwritten is not found.
        self._numbers = 0
        self._block_of: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        self._known_as: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    def take(self, prompt: Sequence[int], keys: int) -> tuple[list[int], int] | None:
        """Blocks for a sequence.

        The keys of the prompt are promised with it: its full blocks are given to others as though
        they were there, which they are if passes are queued in the order of the calls.

        Args:
            prompt: what it begins with.
            keys: that it may come to have.

        Returns:
            Its blocks, and how many tokens of the prompt need not be computed, always fewer than it
            has. None, and nothing taken, where too few are free.
        """
        shared = self._find(prompt)
        needed = blocks_for(keys) - len(shared)
        if needed > self.free - sum(not self._owners[block] for block in shared):
            return None
        for block in shared:
            self._free.pop(block, None)
        blocks = shared + [self._overwrite() for _ in range(needed)]
        for block in blocks:
            self._owners[block] += 1
        self._remember(prompt, blocks)
        return blocks, len(shared) * BLOCK_TOKENS

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence that had these needs them no more."""
        for block in reversed(blocks):  # the end is overwritten first: beginnings are shared more
            self._owners[block] -= 1
            assert self._owners[block] >= 0, f"{block}"
            if not self._owners[block]:
                self._free[block] = None

    def forget(self, blocks: Sequence[int]) -> None:
        """A pass over their prompt may have failed: nobody finds these by what they should hold."""
        for block in blocks:
            if block in self._known_as:
                del self._block_of[self._known_as.pop(block)]

    def _find(self, prompt: Sequence[int]) -> list[int]:
        """The blocks that hold its beginning, and leave a token to be computed."""
        blocks, number = [], 0
        for tokens in _cut(prompt, (len(prompt) - 1) // BLOCK_TOKENS):
            if (number, tokens) not in self._block_of:
                break
            block, number = self._block_of[number, tokens]
            blocks.append(block)
        return blocks

    def _remember(self, prompt: Sequence[int], blocks: Sequence[int]) -> None:
        number = 0
        for block, tokens in zip(blocks, _cut(prompt, len(prompt) // BLOCK_TOKENS), strict=False):
            key = (number, tokens)
            if key not in self._block_of:
                self._numbers += 1
                self._block_of[key] = block, self._numbers
                self._known_as[block] = key
            number = self._block_of[key][1]

    def _overwrite(self) -> int:
        block, _ = self._free.popitem(last=False)
        self.forget([block])
        return block


def _cut(prompt: Sequence[int], blocks: int) -> list[tuple[int, ...]]:
    ends = range(BLOCK_TOKENS, (blocks + 1) * BLOCK_TOKENS, BLOCK_TOKENS)
    return [tuple(prompt[end - BLOCK_TOKENS : end]) for end in ends]
