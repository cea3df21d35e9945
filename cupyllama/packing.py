"""Token rows to micro-batches: every prefix that sorted rows share is computed once.

The rows of a task are sorted; what a row has in common with the row before it lies in the
micro-batch already, so the row contributes only its remaining tokens, its *segment*.  Ragged data
ends here: below this module there are flat int32 arrays and nobody knows of questions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cupyllama.errors import UsageError

# Padding is cut into segments this long, so that it costs attention no more than real text does.
PADDING_SEGMENT = 64


@dataclass(frozen=True)
class TokenRow:
    """One choice of one question as the model reads it.

    `token_ids[first_target:]` are the tokens to be predicted; the last one is never fed.
    """

    token_ids: list[int]
    first_target: int
    choice: int  # index over all choices of all questions


@dataclass(frozen=True)
class MicroBatch:
    """Flat int32 arrays that describe one forward pass.

    A segment's queries are the packed places `segment_start[s]:segment_start[s + 1]`; its keys, in
    row order and its own tokens last, are `key_index[key_start[s]:key_start[s + 1]]`.  The i-th of
    n queries over k keys sees the keys `0 .. k - n + i`.  Row r of the logits is wanted for the
    targets `target_start[r]:target_start[r + 1]`.
    """

    token_ids: np.ndarray  # (tokens,)
    positions: np.ndarray  # (tokens,) place of each token in its row
    segment_start: np.ndarray  # (segments + 1,)
    key_start: np.ndarray  # (segments + 1,)
    key_index: np.ndarray  # (keys,) packed place of every key of every segment
    logit_rows: np.ndarray  # (rows,) packed places whose logits are wanted, ascending
    target_start: np.ndarray  # (rows + 1,)
    target_token: np.ndarray  # (targets,) grouped by logit row
    target_choice: np.ndarray  # (targets,) which choice each target belongs to


def pack(
    rows: Sequence[TokenRow],
    micro_batch_tokens: int,
    multiple: int = 1,
) -> Iterator[MicroBatch]:
    """Sort `rows`, share their prefixes, and cut them into micro-batches.

    A row lies in one micro-batch whole.

    Args:
        multiple: dummy tokens and logit rows make up such multiples, of tokens up to
            `micro_batch_tokens`: full micro-batches then have one shape, and memory that one of
            them has used fits the next.

    Raises:
        UsageError: a row is longer than a micro-batch.
    """
    longest = max((len(row.token_ids) - 1 for row in rows), default=0)
    if longest > micro_batch_tokens:
        raise UsageError(
            f"a row of {longest} tokens does not fit a micro-batch of {micro_batch_tokens}",
            f"Give --micro-batch-tokens {longest} or more.",
        )
    ordered = sorted(rows, key=lambda row: row.token_ids)
    builder = _Builder(micro_batch_tokens, multiple)
    for row in ordered:
        if not builder.add(row):
            yield builder.build()
            builder = _Builder(micro_batch_tokens, multiple)
            builder.add(row)
    if ordered:
        yield builder.build()


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two 1-d arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class _Builder:
    """Rows added in sorted order until the next one does not fit."""

    def __init__(self, micro_batch_tokens: int, multiple: int):
        self.capacity = micro_batch_tokens
        self.multiple = multiple
        self.tokens = 0
        self.fed = np.empty(0, np.int32)  # the last row's tokens, without the one never fed
        self.places = np.empty(0, np.int32)  # where each of them lies in the micro-batch
        self.token_ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segment_lengths: list[int] = []
        self.keys: list[np.ndarray] = []
        self.target_place: list[np.ndarray] = []
        self.target_token: list[np.ndarray] = []
        self.target_choice: list[np.ndarray] = []

    def add(self, row: TokenRow) -> bool:
        """Append `row` if it fits; say whether it did."""
        token_ids = np.array(row.token_ids, np.int32)
        fed = token_ids[:-1]
        shared = common_prefix_length(self.fed, fed)
        new = len(fed) - shared
        if self.tokens + new > self.capacity:
            return False
        own = np.arange(self.tokens, self.tokens + new, dtype=np.int32)
        self.places = np.concatenate([self.places[:shared], own])
        self.fed = fed
        if new:
            self._add_segment(fed[shared:], shared, self.places)
        targets = token_ids[row.first_target :]
        self.target_place.append(self.places[row.first_target - 1 :])
        self.target_token.append(targets)
        self.target_choice.append(np.full(len(targets), row.choice, np.int32))
        return True

    def _add_segment(self, token_ids: np.ndarray, first_position: int, keys: np.ndarray) -> None:
        n = len(token_ids)
        self.token_ids.append(token_ids)
        self.positions.append(np.arange(first_position, first_position + n, dtype=np.int32))
        self.segment_lengths.append(n)
        self.keys.append(keys)
        self.tokens += n

    def _add_padding(self) -> None:
        wanted = min(self.tokens + -self.tokens % self.multiple, self.capacity)
        while self.tokens < wanted:
            n = min(PADDING_SEGMENT, wanted - self.tokens)
            keys = np.arange(self.tokens, self.tokens + n, dtype=np.int32)
            self._add_segment(np.zeros(n, np.int32), 0, keys)

    def build(self) -> MicroBatch:
        self._add_padding()
        place = np.concatenate(self.target_place)
        order = np.argsort(place, kind="stable")  # keeps a choice's targets in row order
        logit_rows, counts = np.unique(place, return_counts=True)
        surplus = -len(logit_rows) % self.multiple
        logit_rows = np.pad(logit_rows, (0, surplus), mode="edge")
        counts = np.pad(counts, (0, surplus))
        return MicroBatch(
            token_ids=np.concatenate(self.token_ids),
            positions=np.concatenate(self.positions),
            segment_start=_offsets(self.segment_lengths),
            key_start=_offsets([len(keys) for keys in self.keys]),
            key_index=np.concatenate(self.keys),
            logit_rows=logit_rows,
            target_start=_offsets(counts),
            target_token=np.concatenate(self.target_token)[order],
            target_choice=np.concatenate(self.target_choice)[order],
        )


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
