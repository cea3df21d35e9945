"""Generation in NumPy: the operations of `reference`, and the Decoder that goes with them."""

from collections.abc import Callable, Sequence

import numpy as np

from cupyllama.families import Stage
from cupyllama.generation.batch import CachedBatch, Segment, cached_batch
from cupyllama.generation.settings import SamplingSettings
from cupyllama.ops.reference import (  # noqa: F401
    add,
    attention,
    download,
    empty,
    gather,
    layernorm,
    linear,
    linear_relu,
    linear_rope,
    linear_swiglu,
    logits,
    memory_errors,
    rmsnorm,
    sum_parts,
    to_device,
)
from cupyllama.ops.sampling_reference import SamplingState, sample, top_log_probs  # noqa: F401
from cupyllama.parallel.links import Links


class Decoder:
    """Rows of sequences that grow side by side, a token a step.

    Every rank has one and is told the same. Where there are several stages the last one's tokens go
    to all of them before a call returns; else results wait until they are asked for, so that the
    next step can be queued before.
    """

    def __init__(
        self,
        stage: Stage,
        cache: Sequence[np.ndarray],
        rows: int,
        max_keys: int,
        vocab_size: int,
        links: Links | None = None,
    ):
        """
        Args:
            stage: with the operations of this module.
            cache: of each of its layers (slots, 2 · kv), in the dtype of its weights.
            rows: sequences at a time, at most.
            max_keys: of a sequence, at most.
            links: to the other stages; None: this one is all of the model.
        """
        self.stage, self.cache, self.links = stage, cache, links
        self.tokens = np.zeros(rows, np.int32)  # sampled last
        self.key_table = np.zeros((rows, max_keys), np.int32)  # the slot of each key
        self.sampling = SamplingState(rows, vocab_size)

    def close(self) -> None:
        """The last that is asked of it: what a device holds for steps may go."""

    def admit(
        self, row: int, slots: np.ndarray, settings: SamplingSettings, seen: Sequence[int]
    ) -> None:
        """A new sequence takes a row.

        Args:
            slots: (keys,) int32, of all keys that it may come to have.
            seen: tokens that a repetition penalty is for already: those of the prompt.
        """
        self.key_table[row, : len(slots)] = slots
        self.sampling.put(row, settings, seen)

    def prefill(self, batch: CachedBatch, rows: Sequence[int]) -> Callable[[], np.ndarray]:
        """Feed prompts, and sample the first token of each.

        Args:
            rows: that of each of batch.logit_rows.

        Returns:
            What waits and gives the tokens: (len(rows),) int32, NO_TOKEN as `sample` has it.
        """
        return self._sample(self.next_logits(batch), np.array(rows, np.int32))

    def step(self, positions: np.ndarray) -> Callable[[], np.ndarray]:
        """Feed rows the tokens that were sampled for them last, and sample the next.

        Args:
            positions: (count,) int32: of each of the first rows, where in its sequence the token
                stands; -1: the row is left out. One at least is not.

        Returns:
            What waits and gives the tokens: (count,) int32, NO_TOKEN as `sample` has it, anything
            for rows that are left out.
        """
        rows = np.flatnonzero(positions >= 0)
        segments = [
            Segment([self.tokens[row]], position, self.key_table[row, : position + 1])
            for row, position in zip(rows, positions[rows], strict=True)
        ]
        tokens = self._sample(self.next_logits(cached_batch(segments)), rows.astype(np.int32))()
        out = np.full(len(positions), -1, np.int32)
        out[rows] = tokens
        return lambda: out

    def next_logits(self, batch: CachedBatch) -> np.ndarray | None:
        """One pass: (rows, vocab) float32, or None on the stages before the last."""
        hidden, links = None, self.links
        if links is not None and not links.is_first:
            shape = len(batch.token_ids), self.stage.config.hidden_size
            hidden = np.empty(shape, self.cache[0].dtype)
            links.receive(hidden)
        with np.errstate(over="ignore", invalid="ignore"):
            out = self.stage.next_logits(batch, hidden, self.cache)
        if links is None or links.is_last:
            return out
        links.send(out)
        return None

    def _sample(self, found: np.ndarray | None, rows: np.ndarray) -> Callable[[], np.ndarray]:
        if found is not None:
            sample(found, rows, self.sampling, self.tokens)
        tokens = self.tokens[rows]
        if self.links is not None:
            self.links.broadcast(tokens)
            self.tokens[rows] = tokens
        return lambda: tokens
