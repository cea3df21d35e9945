"""One forward pass over sequences whose earlier keys and values lie in a cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cupyllama.packing import MicroBatch


@dataclass(frozen=True)
class Segment:
    """Tokens of one sequence that are fed now."""

    token_ids: Sequence[int]
    first_position: int  # of the first of them; the keys before it are in the cache by then
    slots: np.ndarray  # (first_position + tokens,) int32: of every key from position 0 on


@dataclass(frozen=True)
class CachedBatch(MicroBatch):
    """A MicroBatch whose keys are in a cache, where the pass puts those of its own tokens first.

    `key_index` holds slots of the cache, not packed places. A segment may have keys of another one
    of the same pass before its own. Nothing orders segments: unlike the rows of a task, neighbours
    may have no key in common. There are no targets: the token after each of `logit_rows` is wanted.
    """

    slots: np.ndarray  # (tokens,) where the key and the value of each token go


def cached_batch(segments: Sequence[Segment], wanted: Sequence[bool] | None = None) -> CachedBatch:
    """Segments side by side.

    Args:
        wanted: of which segments the token after the last one is asked for; None: of all.
    """
    counts = np.array([len(segment.token_ids) for segment in segments], np.int64)
    assert counts.all() and len(counts), f"{counts}"
    starts = [segment.first_position for segment in segments]
    keys = [segment.slots for segment in segments]
    assert [len(slots) for slots in keys] == (starts + counts).tolist()
    segment_start = np.append(0, np.cumsum(counts)).astype(np.int32)
    last = segment_start[1:] - 1
    nothing = np.zeros(0, np.int32)
    return CachedBatch(
        token_ids=np.concatenate([segment.token_ids for segment in segments]).astype(np.int32),
        positions=np.concatenate(
            [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, counts, strict=True)]
        ),
        segment_start=segment_start,
        key_start=np.append(0, np.cumsum(starts + counts)).astype(np.int32),
        key_index=np.concatenate(keys).astype(np.int32),
        logit_rows=last if wanted is None else last[np.asarray(wanted, bool)],
        target_start=np.zeros(1, np.int32),
        target_token=nothing,
        target_choice=nothing,
        slots=np.concatenate([k[s:] for k, s in zip(keys, starts, strict=True)]).astype(np.int32),
    )
