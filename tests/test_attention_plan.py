"""Which keys a query sees by the host's plan, against the micro-batch that it was made from."""

import time

import numpy as np
import pytest

from cupyllama.generation.batch import Segment, cached_batch
from cupyllama.kernels.definitions import CONTIGUOUS, SECTION, STEP_KEYS
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
                first_row, end_row = rows & 0x7FFF, rows >> 16
                assert 1 <= keys <= STEP_KEYS and first_row < end_row <= count
                places = batch.key_index[key : key + keys].tolist()
                together = places == list(range(places[0], places[0] + STEP_KEYS))
                assert (rows & CONTIGUOUS != 0) == together
                if first_row <= row < end_row:
                    seen += places[: max(position + 1 - begin, 0)]
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
    np.testing.assert_array_equal(as_if_sorted[:, 1], [50])
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
    """A prompt of 260 and three endings of 10: 270 queries, then 10 and 10 that share 2 steps."""
    items, steps = attention_items(one_batch(260, 10, 10, 10), 64)
    apart = [[128, 64, 2, 2], [192, 64, 4, 2], [0, 64, 0, 1], [64, 64, 1, 1]]
    np.testing.assert_array_equal(items, [[256, 34, 6, 5], *apart])
    whole = 64 << 16 | CONTIGUOUS
    alone = [
        [0, 64, 0, 64 << 16],
        [0, 128, 0, whole],
        [0, 128, 0, whole],
        [128, 64, 128, 64 << 16],
        [0, 128, 0, whole],
        [128, 128, 128, whole],
    ]
    joined = [
        [0, 128, 0, 34 << 16 | CONTIGUOUS],  # shared: all rows of the item
        [128, 128, 128, 34 << 16 | CONTIGUOUS],
        [256, 14, 256, 0 | 14 << 16],  # keys 256.. of each row, for its own queries alone
        [270 + 256, 14, 256, 14 | 24 << 16],
        [540 + 256, 14, 256, 24 | 34 << 16],
    ]
    np.testing.assert_array_equal(steps, alone + joined)


def test_parts_end_where_steps_end():
    """Two prompts of 192 that share a first token: 3 parts each, of 64, 128 and 192 keys."""
    rows = [TokenRow([1] + [token] * 192, 100, token) for token in (2, 3)]
    (batch,) = pack(rows, 1024)
    items, steps = attention_items(batch, 64)
    assert sorted(items[:, [0, 1, 3]].tolist()) == [
        [0, 64, 1],
        [64, 64, 1],
        [128, 64, 2],
        [192, 63, 1],
        [255, 64, 1],
        [319, 64, 2],
    ]
    assert len(steps) == 2 * (1 + 1 + 2)


def test_queries_before_a_step_do_not_see_it():
    """The second row's own queries begin at position 100, its second step at 128."""
    items, steps = attention_items(one_batch(100, 20, 100), 128)
    np.testing.assert_array_equal(items, [[120, 100, 1, 2], [0, 120, 0, 1]])
    first = [0, 120, 0, 120 << 16]
    second = [[120, 128, 0, 100 << 16], [248, 72, 128, 28 | 100 << 16]]
    np.testing.assert_array_equal(steps, [first, *second])


def test_rows_that_share_less_than_a_step_stay_apart():
    """128 queries, and what is left of the first row, which shares its first step or does not."""
    items, steps = attention_items(one_batch(127, 10, 10), 128)
    assert len(items) == 3 and len(steps) == 1 + 2 + 2
    items, steps = attention_items(one_batch(128, 10, 10), 128)
    assert len(items) == 2 and len(steps) == 1 + (1 + 1 + 1)


def test_parts_join_only_where_that_saves_steps():
    """The third row shares 1 step of the 4 that the first two share: 3 more to save 1."""
    rows = [[1] * 512 + [7] * 5, [1] * 512 + [8] * 5, [1] * 128 + [9] * 5]
    (batch,) = pack([TokenRow(row, 1, i) for i, row in enumerate(rows)], 524)
    items, steps = attention_items(batch, 128)
    np.testing.assert_array_equal(items[:, 1], [8, 128, 128, 128, 4, 128])
    np.testing.assert_array_equal(items[:, 3], [4 + 1 + 1, 4, 3, 2, 2, 1])


@SIZES
def test_items_and_tiles_run_in_sections(rng, queries):
    batch = max(forest(rng, 300, 170, 8192), key=lambda batch: len(batch.segment_start))
    items, _ = attention_items(batch, queries)
    tiles = attention_tiles(batch)
    place = batch.segment_start[tiles[:, 0]] + tiles[:, 1]
    keys = batch.positions[np.minimum(place + QUERY_TILE, batch.segment_start[tiles[:, 0] + 1]) - 1]
    kinds = ((items[:, 0], items[:, 3], SECTION), (place, keys, TILE_SECTION))
    for places, work, section in kinds:
        last = (len(places) // section - 1) * section  # with what is left over
        assert last > section
        assert work[last:].max() <= work[:last].min()
        for begin in range(0, last, section):
            end = begin + section
            assert (np.diff(work[begin:end]) <= 0).all()
            assert (places[begin:end] < places[end:last].min(initial=1 << 30)).all()
        assert (np.diff(work[last:]) <= 0).all()


@SIZES
def test_fewer_items_than_a_section_run_longest_first(queries):
    batch = one_batch(5 * STEP_KEYS, 10, 10)
    items, _ = attention_items(batch, queries)
    assert 1 < len(items) < SECTION
    assert (np.diff(items[:, 3]) <= 0).all()


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
