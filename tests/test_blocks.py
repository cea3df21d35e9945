"""The blocks of the cache: nobody's twice, found again by what is in them, none lost."""

import numpy as np
import pytest

from cupyllama.generation.blocks import BLOCK_TOKENS, BlockPool, blocks_for, slots_of


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def test_slots():
    np.testing.assert_array_equal(
        slots_of([3, 1], 19), [*range(48, 64), *range(16, 19)], strict=False
    )
    assert slots_of([3], 16).dtype == np.int32
    assert [blocks_for(keys) for keys in (1, 16, 17)] == [1, 1, 2]


def test_nobody_gets_block_0_and_nothing_is_taken_where_too_few_are_free():
    pool = BlockPool(6)
    assert pool.capacity == pool.free == 5
    first, shared = pool.take(tokens(5), 3 * BLOCK_TOKENS)
    assert shared == 0 and len(set(first)) == 3 and 0 not in first
    assert pool.take(tokens(5, 100), 2 * BLOCK_TOKENS + 1) is None
    assert pool.free == 2
    second, _ = pool.take(tokens(5, 100), 2 * BLOCK_TOKENS)
    assert set(first) | set(second) == set(range(1, 6))
    pool.release(first)
    assert pool.free == 3


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        (tokens(40), 32),
        (tokens(33), 32),
        (tokens(32), 16),  # a token is left, or there would be no logits
        (tokens(17), 16),
        (tokens(16), 0),
        (tokens(20) + tokens(20, 500), 16),
        (tokens(40, 1), 0),
        (tokens(16, 16) + tokens(5), 0),  # the second block of the other, which is not its first
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_full_blocks_of_a_prompt_are_found_again(prompt, shared, released):
    pool = BlockPool(20)
    blocks, _ = pool.take(tokens(40), 60)
    if released:
        pool.release(blocks)
    found, computed_from = pool.take(prompt, 50)
    assert computed_from == shared
    count = shared // BLOCK_TOKENS
    assert found[:count] == blocks[:count]
    assert not released and not set(found[count:]) & set(blocks) or released
    assert pool.free == 19 - len(set(found) | (set() if released else set(blocks)))


def test_what_a_sequence_adds_to_its_prompt_is_not_given_to_others():
    pool = BlockPool(20)
    pool.release(pool.take(tokens(20), 64)[0])
    assert pool.take(tokens(64), 64)[1] == BLOCK_TOKENS


def test_a_block_is_shared_until_the_last_owner_is_gone():
    pool = BlockPool(4)
    first, _ = pool.take(tokens(17), 32)
    second, shared = pool.take(tokens(17), 32)
    assert shared == 16 and first[0] == second[0] and pool.free == 0
    pool.release(first)
    assert pool.free == 1 and pool.take(tokens(2, 50), 32) is None
    pool.release(second)
    assert pool.free == 3
    with pytest.raises(AssertionError):
        pool.release(second)


def test_beginnings_are_overwritten_last_and_then_not_found():
    pool = BlockPool(4)
    blocks, _ = pool.take(tokens(48), 48)
    pool.release(blocks)
    other, _ = pool.take(tokens(3, 900), 16)
    assert other == [blocks[2]]
    pool.release(other)
    again, shared = pool.take(tokens(48), 48)
    assert shared == 32 and again[:2] == blocks[:2]
    pool.release(again)
    everything, shared = pool.take(tokens(48, 300), 48)
    assert shared == 0 and set(everything) == set(blocks)
    pool.release(everything)
    assert pool.take(tokens(48), 48)[1] == 0


@pytest.mark.parametrize("seed", range(5))
def test_random_owners(seed):
    """What a cache would hold, of each key all tokens up to it, is written down and looked up."""

    def known(sequence):
        return [hash(tuple(sequence[: place + 1])) for place in range(len(sequence))]

    rng = np.random.default_rng(seed)
    pool, content, owners = BlockPool(24), {}, []
    shares = 0
    for _ in range(600):
        if owners and rng.random() < 0.5:
            pool.release(owners.pop(rng.integers(len(owners)))[1])
        stem = [tokens(BLOCK_TOKENS, int(first)) for first in rng.integers(2, size=rng.integers(4))]
        prompt = sum(stem, []) + rng.integers(0, 3, int(rng.integers(1, 20))).tolist()
        keys = len(prompt) + int(rng.integers(0, 40))
        free = pool.free
        taken = pool.take(prompt, keys)
        if taken is None:
            assert pool.free == free < blocks_for(keys)
            continue
        blocks, shared = taken
        assert len(blocks) == len(set(blocks)) == blocks_for(keys) and 0 not in blocks
        assert shared < len(prompt) and shared % BLOCK_TOKENS == 0
        shares += shared > 0
        slots = slots_of(blocks, keys).tolist()
        assert [content[slot] for slot in slots[:shared]] == known(prompt)[:shared]
        others = {slot for _, _, theirs in owners for slot in theirs}
        assert not others & set(slots[shared:])
        answer = rng.integers(5000, 6000, keys - len(prompt)).tolist()
        content |= dict(zip(slots[shared:], known(prompt + answer)[shared:], strict=True))
        owners.append((prompt, blocks, slots))
        for theirs, _, places in owners:
            assert [content[slot] for slot in places[: len(theirs)]] == known(theirs)
        held = {block for _, theirs, _ in owners for block in theirs}
        assert pool.free == pool.capacity - len(held)
    assert shares > 50, shares
