"""How attention is cut for the GPU: the queries of a micro-batch, and the keys that each part sees.

`attention_tiles` is for `attention_mma` and `attention_portable`, `attention_items` for
`attention_sm90`.  NumPy alone, on the host, while the device is at work.
"""

import numpy as np

from cupyllama.kernels.definitions import CONTIGUOUS, SECTION, STEP_KEYS
from cupyllama.packing import MicroBatch, common_prefix_length

# Queries of a tile.
QUERY_TILE = 64
# Neighbouring tiles among which those with most work go first.  A larger number takes them from
# the neighbours whose keys are in the L2 cache: 518 us for few-shot prompts, 639 without sections.
TILE_SECTION = 16
# Mean keys of a segment from which an item has 128 queries instead of 64: at 276 these take 178 us
# and those 143, at 471 both 147, at 1,395 these 242 and those 314.
LONG_KEYS = 480


def attention_arrays(
    batch: MicroBatch, queries: int, in_common: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What the kernels read besides the micro-batch: int32, those in units of 16 bytes first.

    Args:
        queries: of an item: `item_queries`.
        in_common: as `attention_items` takes it.

    Returns:
        items: (items, 4) and steps: (steps, 4) of `attention_items`.
        tiles: (tiles, 2) of `attention_tiles`.
        counter: (1,) 0, as `attention_sm90` leaves it too.
    """
    items, steps = attention_items(batch, queries, in_common)
    tiles, counter = attention_tiles(batch), np.zeros(1, np.int32)
    return {"items": items, "steps": steps, "tiles": tiles, "counter": counter}


def attention_tiles(batch: MicroBatch) -> np.ndarray:
    """Segments cut into QUERY_TILE queries: (tiles, 2) int32, segment and first query in it.

    In packed order, for neighbours share keys; within a section those that see most keys first.
    """
    past, segment, first, queries = _cut(batch, QUERY_TILE, at_steps=False)
    order = _longest_first(past[segment] + first + queries, TILE_SECTION)
    return np.stack([segment, first], axis=1)[order].astype(np.int32)


def item_queries(batch: MicroBatch) -> int:
    """Queries of an item, by shapes alone: 128 where rows are long, else 64."""
    segments = len(batch.segment_start) - 1
    return 128 if len(batch.key_index) >= LONG_KEYS * segments else 64


def keys_in_common(batch: MicroBatch) -> np.ndarray:
    """How many keys each segment begins with that are those of the segment before: (segments,)."""
    keys = np.split(batch.key_index, batch.key_start[1:-1])
    return np.array([0, *map(common_prefix_length, keys, keys[1:])])


def attention_items(
    batch: MicroBatch, queries: int, in_common: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Items of up to `queries` consecutive queries, and the steps of keys that each takes.

    An item is a part of a segment, or parts of several where that saves steps: the whole steps that
    their rows have in common are taken once for all of them.

    Args:
        in_common: `keys_in_common` of segments in any order; None: each is of the next row of some
            that are sorted, and begins with all that it has of the row before.

    Returns:
        items: (items, 4) int32: packed place of the first query, queries, first step, steps.
        steps: (steps, 4) int32: where the first key stands in key_index, keys, position of the
            first key in its row, and of the item's queries the first to see it | the end << 16,
            and CONTIGUOUS where there are STEP_KEYS that lie side by side in the order of the row.
    """
    past, segment, first, count = _cut(batch, queries, at_steps=True)
    position = past[segment] + first  # of a part's first query in its row
    keys = position + count
    part_steps = -(-keys // STEP_KEYS)
    # The first `past` keys of a row are the first of the row before it as well, or some of them.
    same = past if in_common is None else np.minimum(past, in_common)
    with_before = np.where(first == 0, same[segment] // STEP_KEYS, 0)
    joined, item_shared = _join(count.tolist(), part_steps.tolist(), with_before.tolist(), queries)

    opens = np.flatnonzero(~joined)  # the first part of each item
    item_of_part = np.cumsum(~joined) - 1
    item_count = np.add.reduceat(count, opens) if len(opens) else count
    parts = np.diff(np.append(opens, len(count)))
    shared = np.where(parts > 1, item_shared, 0)
    row = np.cumsum(count) - count  # of a part's first query, counted in the item
    row -= row[opens][item_of_part]

    # Runs of steps: of every item what all its parts share, then of each part the rest.
    part = np.insert(np.arange(len(count)), opens, opens)
    whole = np.insert(np.zeros(len(count), bool), opens, True)
    begin = np.where(whole, 0, shared[item_of_part[part]])
    run_steps = np.where(whole, shared[item_of_part[part]], part_steps[part]) - begin
    end_row = np.where(whole, item_count[item_of_part[part]], row[part] + count[part])

    run = np.repeat(np.arange(len(part)), run_steps)
    key = (np.arange(len(run)) - (np.cumsum(run_steps) - run_steps - begin)[run]) * STEP_KEYS
    of = part[run]
    seen_from = np.where(whole[run], 0, row[of] + np.maximum(key - position[of], 0))
    begins = batch.key_start[segment[of]] + key
    step_keys = np.minimum(keys[of] - key, STEP_KEYS)
    rows = seen_from | end_row[run] << 16 | _contiguous(batch.key_index, begins, step_keys)
    steps = np.stack([begins, step_keys, key, rows], axis=1)
    item_steps = np.bincount(item_of_part[of], minlength=len(opens))
    place = batch.segment_start[segment[opens]] + first[opens]
    items = np.stack([place, item_count, np.cumsum(item_steps) - item_steps, item_steps], axis=1)
    order = _longest_first(item_steps, SECTION)
    return items[order].astype(np.int32), steps.astype(np.int32)


def _cut(
    batch: MicroBatch, size: int, at_steps: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Segments in parts of up to `size` queries.

    Args:
        at_steps: parts end at multiples of `size` in their rows, where that makes no more of them.
            Rows have BOS in common, and the first part of a segment would begin at position 1:
            parts would end one key behind a step, and take one more for it.

    Returns:
        past: (segments,) keys before a segment's own; and of each part, in packed order, its
        segment, its first query in the segment, and its queries.
    """
    queries = np.diff(batch.segment_start).astype(np.int64)
    past = np.diff(batch.key_start) - queries
    count = -(-queries // size)
    lead = np.full(len(queries), size)  # queries of a segment's first part, if it has more
    if at_steps:
        to_step = size - past % size
        fits = (to_step < queries) & (1 - (to_step - queries) // size == count)
        lead = np.where(fits, to_step, size)
    segment = np.repeat(np.arange(len(queries)), count)
    number = np.arange(len(segment)) - np.repeat(np.cumsum(count) - count, count)
    first = np.where(number == 0, 0, lead[segment] + (number - 1) * size)
    end = np.minimum(lead[segment] + number * size, queries[segment])
    return past, segment, first, end - first


def _contiguous(key_index: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """CONTIGUOUS for whole steps of keys that lie side by side, 0 for others.

    Of fewer keys the copy engine would fetch others' as well, whose NaN were not theirs alone.
    """
    breaks = np.zeros(len(key_index), np.int64)  # before each key, counted from the first
    np.cumsum(np.diff(key_index) != 1, out=breaks[1:])
    together = breaks[begins] == breaks[begins + counts - 1]
    return np.where(together & (counts == STEP_KEYS), CONTIGUOUS, 0)


def _join(
    counts: list[int], part_steps: list[int], with_before: list[int], queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Whether each part joins the item of the part before it, and the steps that an item shares.

    It does where the item has room for its queries, and takes fewer steps than both apart.
    """
    joined, shared = [], []
    room = parts = common = 0
    for count, steps, before in zip(counts, part_steps, with_before, strict=True):
        left = min(common, before)
        # The steps that are no longer shared are taken by each of the parts that shared them.
        join = count <= room and left > (common - left) * (parts - 1)
        if join:
            room, parts, common = room - count, parts + 1, left
            shared[-1] = common
        else:
            room, parts, common = queries - count, 1, steps
            shared.append(common)
        joined.append(join)
    return np.array(joined, bool), np.array(shared, np.int64)


def _longest_first(work: np.ndarray, section: int) -> np.ndarray:
    """An order: section after section, within one those with most work first.

    Those with least work of all come last, a section of them and what is left over: with these the
    multiprocessors end at about the same time.
    """
    least = section + len(work) % section
    by_work = np.argsort(-work, kind="stable")
    many, few = np.sort(by_work[:-least]), by_work[-least:]
    many = many[np.lexsort((-work[many], np.arange(len(many)) // section))]
    return np.concatenate([many, few])
