"""Which keys a query sees by the host's plan, against the micro-batch that it was made from."""

import time

import numpy as np
import pytest

from cupyllama.generation.batch import Segment, cached_batch
from cupyllama.kernels.definitions import SECTION, STEP_KEYS
from cupyllama.ops.attention_plan import (
    LONG_KEYS,
    QUERY_TILE,
    TILE_SECTION,
    attention_arrays,
    attention_items,
    attention_tiles,
    item_queries,
    keys_in_common,
)
from cupyllama.packing import TokenRow, pack

SIZES = pytest.mark.parametrize("queries", [64, 128])


@pytest.fixture
def rng():
    seed = time.time_ns() % 2**32
    print(f"{seed=}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def forest(rng, rows, longest, tokens):
    """Micro-batches of random rows of 1 to `longest` tokens, most of which share a prefix."""
    token_rows: list[TokenRow] = []
    for choice in range(rows):
        token_ids = rng.integers(0, 99, rng.integers(2, longest + 2)).tolist()
        if token_rows and rng.random() < 0.8:
            other = token_rows[rng.integers(len(token_rows))].token_ids
            cut = rng.integers(len(other))
            token_ids = (other[:cut] + token_ids)[: longest + 1]
        token_rows.append(TokenRow(token_ids, len(token_ids) - 1, choice))
    return list(pack(token_rows, tokens, 8))


FORESTS = [(1, 1, 16), (3, 5, 64), (60, 170, 2048), (40, 700, 4096), (400, 30, 8192), (9, 65, 512)]


def one_batch(prompt, *endings):
    """Rows of one prompt and endings of these lengths."""
    rows = [
        TokenRow([1] * prompt + [2 + choice] * (length + 1), prompt, choice)
        for choice, length in enumerate(endings)
    ]
    (batch,) = pack(rows, prompt + sum(endings))
    return batch


def keys_of_places(batch):
    """For every packed place, the places of the keys that it sees, in row order."""
    keys = {}
    for s in range(len(batch.segment_start) - 1):
        first, last = batch.segment_start[s : s + 2]
        row = batch.key_index[batch.key_start[s] : batch.key_start[s + 1]].tolist()
        for place in range(first, last):
            keys[place] = row[: len(row) - (last - 1 - place)]
    return keys


def keys_by_plan(batch, items, steps):
    """The same as a kernel finds them: step after step, up to the position of the query."""
    found = {}
    for place, count, first_step, step_count in items.tolist():
        for row in range(count):
            position = int(batch.positions[place + row])
            seen, begins = [], []
            for key, keys, begin, rows in steps[first_step : first_step + step_count].tolist():
                assert 1 <= keys <= STEP_KEYS and (rows & 0xFFFF) < rows >> 16 <= count
                if rows & 0xFFFF <= row < rows >> 16:
                    seen += batch.key_index[key : key + keys].tolist()[
                        : max(position + 1 - begin, 0)
                    ]
                    begins.append(begin)
            # Bits depend on where steps begin, and on nothing a row can see being behind its own.
            assert begins == list(range(0, len(begins) * STEP_KEYS, STEP_KEYS))
            assert place + row not in found
            found[place + row] = seen
    return found


@SIZES
@pytest.mark.parametrize("rows, longest, tokens", FORESTS)
def test_every_query_sees_its_keys_in_order(rng, queries, rows, longest, tokens):
    for batch in forest(rng, rows, longest, tokens)[:3]:
        items, steps = attention_items(batch, queries)
        assert items.dtype == steps.dtype == np.int32
        assert (items[:, 1] <= queries).all() and (items[:, 3] > 0).all()
        assert keys_by_plan(batch, items, steps) == keys_of_places(batch)
        # Every step is taken by one item.
        begins, counts = items[:, 2], items[:, 3]
        taken = np.concatenate([np.arange(b, b + c) for b, c in zip(begins, counts, strict=True)])
        assert sorted(taken.tolist()) == list(range(len(steps)))


def sequences(rng, *shapes):
    """Segments with keys in a cache.

    Args:
        shapes: of each its own tokens, the keys before them, and the segment that has these as its
            first; -1: nobody has.
    """
    slots = iter(rng.permutation(1 << 16).astype(np.int32))
    found = []
    for own, past, other in shapes:
        first = [next(slots) for _ in range(past)] if other < 0 else found[other].slots[:past]
        row = np.array([*first, *(next(slots) for _ in range(own))], np.int32)
        assert len(row) == past + own
        found.append(Segment([7] * own, past, row))
    return cached_batch(found)


# Neighbours with as many keys before their own, and none in common; or some, or all.
CACHED = [
    [(1, 0, -1)],
    [(1, 4095, -1), (1, 4095, -1)],
    [(10, 200, -1), (10, 200, -1), (10, 200, 1), (10, 200, 0), (10, 130, 3)],
    [(300, 0, -1), (9, 256, 0), (5, 260, 1), (5, 64, -1), (5, 64, 3), (70, 300, 0), (1, 63, 0)],
    [(1, 70, -1)] * 5 + [(1, 70, 4)] * 40 + [(1, 71, 44), (1, 70, 0)],
]


@SIZES
@pytest.mark.parametrize("shapes", CACHED)
def test_neighbours_share_only_the_keys_that_are_the_same(rng, queries, shapes):
    batch = sequences(rng, *shapes)
    items, steps = attention_items(batch, queries, keys_in_common(batch))
    assert keys_by_plan(batch, items, steps) == keys_of_places(batch)


def test_keys_in_common(rng):
    batch = sequences(rng, *CACHED[3])
    np.testing.assert_array_equal(keys_in_common(batch), [0, 256, 260, 0, 64, 0, 63])
    batch = sequences(rng, *CACHED[2])
    np.testing.assert_array_equal(keys_in_common(batch), [0, 0, 200, 0, 130])
    as_if_sorted, _ = attention_items(batch, 128)
    np.testing.assert_array_equal(as_if_sorted[:, 1], [40, 10])
    items, _ = attention_items(batch, 128, keys_in_common(batch))
    np.testing.assert_array_equal(np.sort(items[:, 1]), [10, 20, 20])


@pytest.mark.parametrize("rows, longest, tokens", FORESTS)
def test_sorted_rows_are_planned_alike_either_way(rng, rows, longest, tokens):
    for batch in forest(rng, rows, longest, tokens)[:3]:
        plain, compared = (attention_items(batch, 64, x) for x in (None, keys_in_common(batch)))
        for a, b in zip(plain, compared, strict=True):
            np.testing.assert_array_equal(a, b)


@SIZES
@pytest.mark.parametrize("rows, longest, tokens", FORESTS)
def test_sharing_saves_steps(rng, queries, rows, longest, tokens):
    for batch in forest(rng, rows, longest, tokens)[:3]:
        apart = 0
        for s in range(len(batch.segment_start) - 1):
            own = int(np.diff(batch.segment_start)[s])
            past = int(np.diff(batch.key_start)[s]) - own
            ends = [min(first + queries, own) for first in range(0, own, queries)]
            apart += sum(-(-(past + end) // STEP_KEYS) for end in ends)
        assert len(attention_items(batch, queries)[1]) <= apart


def test_items_by_hand():
    """A prompt of 130 and three endings of 10: 140 queries, then 10 and 10 that share 2 steps."""
    batch = one_batch(130, 10, 10, 10)
    items, steps = attention_items(batch, 64)
    np.testing.assert_array_equal(items, [[128, 32, 3, 5], [64, 64, 1, 2], [0, 64, 0, 1]])
    joined = [
        [0, 64, 0, 32 << 16],  # shared: all rows of the item
        [64, 64, 64, 32 << 16],
        [128, 12, 128, 0 | 12 << 16],  # keys 128.. of each row, for its own queries alone
        [140 + 128, 12, 128, 12 | 22 << 16],
        [280 + 128, 12, 128, 22 | 32 << 16],
    ]
    alone = [[0, 64, 0, 64 << 16], [0, 64, 0, 64 << 16], [64, 64, 64, 64 << 16]]
    np.testing.assert_array_equal(steps, alone + joined)


def test_parts_end_where_steps_end():
    """Two prompts of 192 that share a first token: 3 parts each, of 1, 2 and 3 steps."""
    rows = [TokenRow([1] + [token] * 192, 100, token) for token in (2, 3)]
    (batch,) = pack(rows, 1024)
    items, steps = attention_items(batch, 64)
    assert sorted(items[:, [0, 1, 3]].tolist()) == [
        [0, 64, 1],
        [64, 64, 2],
        [128, 64, 3],
        [192, 63, 1],
        [255, 64, 2],
        [319, 64, 3],
    ]
    assert len(steps) == 2 * (1 + 2 + 3)


def test_queries_before_a_step_do_not_see_it():
    items, steps = attention_items(one_batch(70, 30), 128)
    np.testing.assert_array_equal(items, [[0, 100, 0, 2]])
    np.testing.assert_array_equal(steps, [[0, 64, 0, 100 << 16], [64, 36, 64, 64 | 100 << 16]])


def test_rows_that_share_less_than_a_step_stay_apart():
    items, steps = attention_items(one_batch(63, 10, 10), 128)
    assert len(items) == 2 and len(steps) == 2 + 2
    items, steps = attention_items(one_batch(64, 10, 10), 128)
    assert len(items) == 1 and len(steps) == 1 + 1 + 1


def test_parts_join_only_where_that_saves_steps():
    """The third row shares 1 step of the 4 that the first two share: 3 more to save 1."""
    rows = [[1] * 256 + [7] * 5, [1] * 256 + [8] * 5, [1] * 64 + [9] * 5]
    (batch,) = pack([TokenRow(row, 1, i) for i, row in enumerate(rows)], 268)
    items, steps = attention_items(batch, 128)
    np.testing.assert_array_equal(items[:, 1], [8, 128, 128, 4])
    np.testing.assert_array_equal(items[:, 3], [4 + 1 + 1, 4, 2, 2])


@SIZES
def test_items_and_tiles_run_in_sections(rng, queries):
    batch = max(forest(rng, 300, 170, 8192), key=lambda batch: len(batch.segment_start))
    items, _ = attention_items(batch, queries)
    tiles = attention_tiles(batch)
    place = batch.segment_start[tiles[:, 0]] + tiles[:, 1]
    keys = batch.positions[np.minimum(place + QUERY_TILE, batch.segment_start[tiles[:, 0] + 1]) - 1]
    kinds = ((items[:, 0], items[:, 3], SECTION), (place, keys, TILE_SECTION))
    for places, work, section in kinds:
        assert len(places) > 2 * section
        begins = range(0, len(places) - section + 1, section)  # the last takes what is left over
        for begin, end in zip(begins, [*begins[1:], len(places)], strict=True):
            assert (np.diff(work[begin:end]) <= 0).all()
            assert (places[begin:end] < places[end:].min(initial=1 << 30)).all()


@pytest.mark.parametrize("rows, longest, tokens", FORESTS)
def test_tiles_cover_every_query_once(rng, rows, longest, tokens):
    for batch in forest(rng, rows, longest, tokens)[:3]:
        covered = np.zeros(len(batch.token_ids), int)
        for segment, first in attention_tiles(batch):
            begin, end = batch.segment_start[segment : segment + 2]
            assert begin + first < end
            covered[begin + first : min(begin + first + QUERY_TILE, end)] += 1
        assert (covered == 1).all()


def test_arrays_are_aligned_one_after_the_other(rng):
    batch = forest(rng, 30, 100, 1024)[0]
    at = 0
    for name, array in attention_arrays(batch, 64).items():
        assert array.dtype == np.int32
        assert at % (4 * array.shape[-1]) == 0, name  # int4, int2, int
        at += array.nbytes


def test_long_rows_have_larger_items():
    assert item_queries(one_batch(LONG_KEYS - 30, 30, 30)) == 128
    assert item_queries(one_batch(LONG_KEYS - 31, 30, 30)) == 64
