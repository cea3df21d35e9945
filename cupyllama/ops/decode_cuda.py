"""Generation on a GPU: the operations of `cuda`, some by what is faster for few rows, and the
Decoder that goes with them.

A step is a hundred launches a millisecond, more than the host can make. It is captured once as a
graph for so many rows, and replayed for as many or fewer.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import cupy
import cupyx
import numpy as np

from cupyllama.families import Stage
from cupyllama.generation.batch import CachedBatch
from cupyllama.generation.settings import SamplingSettings
from cupyllama.kernels import debugging
from cupyllama.ops import attention as prefill_attention
from cupyllama.ops.attention_decode import DecodeBatch, attention_decode
from cupyllama.ops.attention_plan import attention_arrays, item_queries, keys_in_common
from cupyllama.ops.cuda import (  # noqa: F401
    DeviceBatch,
    add,
    download,
    empty,
    gather,
    layernorm,
    logits,
    memory_errors,
    rmsnorm,
    sum_parts,
    to_device,
    upload_arrays,
)
from cupyllama.ops.few_rows import (  # noqa: F401
    linear,
    linear_relu,
    linear_rope,
    linear_swiglu,
)
from cupyllama.ops.graphs import Graphs
from cupyllama.ops.sampling import SamplingState, sample, top_log_probs  # noqa: F401
from cupyllama.parallel.links import Links

# Rows for which steps are captured; a step of others is one of the next of them, or of all rows.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Array = cupy.ndarray


@dataclass(frozen=True)
class DeviceCachedBatch(DeviceBatch):
    """A CachedBatch in device memory."""

    slots: Array  # (tokens,)


def upload(batch: CachedBatch) -> DeviceCachedBatch:
    """The batch in device memory by one copy, which the host does not wait for."""
    # These come first: the kernels read them by fours and in pairs, which must be aligned.
    queries = item_queries(batch)
    arrays = attention_arrays(batch, queries, keys_in_common(batch))
    arrays |= {field.name: getattr(batch, field.name) for field in fields(CachedBatch)}
    parts, pinned = upload_arrays(arrays)
    return DeviceCachedBatch(**parts, item_queries=queries, staged=pinned)


def attention(
    qkv: Array,
    batch: DeviceCachedBatch | DecodeBatch,
    num_heads: int,
    num_key_value_heads: int,
    cache: Array,
) -> Array:
    """softmax(q · kᵀ / sqrt(head_dim)) · v over keys in the cache, where those of qkv go first."""
    on = attention_decode if isinstance(batch, DecodeBatch) else prefill_attention.attention
    return on(qkv, batch, num_heads, num_key_value_heads, cache)


class Decoder:
    """Rows of sequences that grow side by side, a token a step; see `decode_reference`."""

    def __init__(
        self,
        stage: Stage,
        cache: Sequence[Array],
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
        self.tokens = cupy.zeros(rows, np.int32)  # sampled last
        self.key_table = cupy.zeros((rows, max_keys), np.int32)  # the slot of each key
        self.sampling = SamplingState(rows, vocab_size)
        # What goes through the host's memory between ranks cannot be captured; nor can anything
        # that waits for each kernel.
        group_can = stage.group is stage.ops or getattr(stage.group, "capturable", False)
        self._graphs = Graphs() if group_can and not debugging() else None
        self._steps: dict[int, _Step] = {}
        self._kept: deque[tuple[cupy.cuda.Event, Any]] = deque()

    def close(self) -> None:
        """Let go of the steps' graphs; before the group goes, if it has one.

        A communicator of NCCL that is destroyed waits for the graphs that use it, for good if
        nobody else destroys them.
        """
        self._steps.clear()

    def admit(
        self, row: int, slots: np.ndarray, settings: SamplingSettings, seen: Sequence[int]
    ) -> None:
        """A new sequence takes a row.

        Args:
            slots: (keys,) int32, of all keys that it may come to have.
            seen: tokens that a repetition penalty is for already: those of the prompt.
        """
        self._send(slots, self.key_table[row, : len(slots)])
        self.sampling.put(row, settings, seen)

    def prefill(self, batch: CachedBatch, rows: Sequence[int]) -> Callable[[], np.ndarray]:
        """Feed prompts, and sample the first token of each.

        Args:
            rows: that of each of batch.logit_rows.

        Returns:
            What waits and gives the tokens: (len(rows),) int32, NO_TOKEN as `sample` has it.
        """
        found = self.next_logits(batch)
        if found is not None:
            on_device = cupy.empty(len(rows), np.int32)
            self._send(np.array(rows, np.int32), on_device)
            sample(found, on_device, self.sampling, self.tokens)
        tokens = self._sampled(len(self.tokens))
        return lambda: tokens()[rows]

    def step(self, positions: np.ndarray) -> Callable[[], np.ndarray]:
        """Feed rows the tokens that were sampled for them last, and sample the next.

        Args:
            positions: (count,) int32: of each of the first rows, where in its sequence the token
                stands; -1: the row is left out. One at least is not.

        Returns:
            What waits and gives the tokens: (count,) int32, NO_TOKEN as `sample` has it, anything
            for rows that are left out.
        """
        step = self._step_of(len(positions))
        self._send(_inputs(positions, step.rows), step.inputs)
        if step.hidden is not None:
            self.links.receive(step.hidden)
        step.launch()
        if step.out is not None:
            self.links.send(step.out)
        return self._sampled(len(positions))

    def next_logits(self, batch: CachedBatch) -> Array | None:
        """One pass: (rows, vocab) float32, or None on the stages before the last."""
        hidden, links = None, self.links
        if links is not None and not links.is_first:
            shape = len(batch.token_ids), self.stage.config.hidden_size
            hidden = cupy.empty(shape, self.cache[0].dtype)
            links.receive(hidden)
        uploaded = upload(batch)
        out = self.stage.next_logits(uploaded, hidden, self.cache)
        self._keep(uploaded)
        if links is None or links.is_last:
            return out
        links.send(out)
        return None

    def _step_of(self, count: int) -> "_Step":
        capacity = len(self.tokens)
        rows = min(next((bucket for bucket in BUCKETS if bucket >= count), capacity), capacity)
        if rows not in self._steps:
            step = _Step(self, rows)
            if self._graphs is not None:
                # Before it is captured it runs once, and must change nothing.
                self._send(_inputs(np.full(rows, -1), rows), step.inputs)
                step.graph = self._graphs.capture(step.compute)
            self._steps[rows] = step
        return self._steps[rows]

    def _sampled(self, count: int) -> Callable[[], np.ndarray]:
        """The tokens of the first rows on their way, with several stages to all ranks."""
        if self.links is None:
            return download(self.tokens[:count])
        if self.links.is_last:
            tokens = download(self.tokens)()
            self.links.broadcast(tokens)
        else:
            tokens = np.empty(len(self.tokens), np.int32)
            self.links.broadcast(tokens)
            self._send(tokens, self.tokens)
        return lambda: tokens[:count]

    def _send(self, array: np.ndarray, to: Array) -> None:
        """Begin to copy an array to the device; the caller may change it at once."""
        pinned = cupyx.empty_pinned(array.shape, array.dtype)
        pinned[...] = array
        to.set(pinned)
        self._keep(pinned)

    def _keep(self, used: Any) -> None:
        """Hold what the device may be using until it is past all that is queued."""
        while self._kept and self._kept[0][0].done:
            self._kept.popleft()
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        self._kept.append((event, used))


class _Step:
    """A step of so many rows: what it reads and leaves, and its graph once it has one."""

    def __init__(self, decoder: Decoder, rows: int):
        self.rows, self.graph = rows, None
        self.inputs = cupy.empty((3, rows), np.int32)  # as `_inputs` has them
        positions, last_key, self._numbers = self.inputs
        self._batch = DecodeBatch(decoder.tokens[:rows], positions, last_key, decoder.key_table)
        self._decoder = decoder
        self.hidden = self.out = None  # from the stage before, and for the one after
        if decoder.links is not None and not decoder.links.is_first:
            self.hidden = cupy.empty(
                (rows, decoder.stage.config.hidden_size), decoder.cache[0].dtype
            )

    def launch(self) -> None:
        """Queue it on the current stream."""
        if self.graph is None:
            self.compute()
        else:
            self.graph.launch()

    def compute(self) -> None:
        """Its launches, one by one."""
        decoder, self.out = self._decoder, None
        out = decoder.stage.next_logits(self._batch, self.hidden, decoder.cache)
        if decoder.stage.is_last:
            sample(out, self._numbers, decoder.sampling, decoder.tokens)
        else:
            self.out = out


def _inputs(positions: np.ndarray, rows: int) -> np.ndarray:
    """What a step is told of its rows: (3, rows).

    The position of each, 0 where it is idle; the same, but -1 where it is idle; its number, or -1.
    """
    inputs = np.full((3, rows), -1, np.int32)
    busy = positions >= 0
    inputs[1, : len(positions)] = np.where(busy, positions, -1)
    inputs[2, : len(positions)] = np.where(busy, np.arange(len(positions)), -1)
    inputs[0] = np.maximum(inputs[1], 0)
    return inputs
