"""What the stages of all families have in common: the order in which layers follow one another."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.packing import MicroBatch

Array = Any  # numpy.ndarray or cupy.ndarray: whatever `ops` works on
Group = Any  # cupyllama.parallel.group.Group
# A family's own, as `cupyllama.model` has them.
LayerWeights = Any
StageWeights = Any


class LayerStack:
    """A contiguous slice of the decoder layers, with the ends of the model that it has.

    A family's Stage adds what its layers compute:
    embed(batch) -> (tokens, hidden),
    mix(layer, batch, hidden, cache) -> what attention finds, before its output projection,
    transform(layer, mixed, hidden) -> the rest of the layer, token by token,
    head(layer, mixed, hidden) -> the same of the last layer, and logits float32.
    """

    def __init__(
        self, config: Any, weights: StageWeights, ops: ModuleType, group: Group | None = None
    ):
        """A family's takes `positions` too, the longest row that will be fed, in tokens.

        Args:
            group: of the ranks that have parts of the matrices; None: they are whole.
        """
        self.config = config
        self.weights = weights
        self.ops = ops
        self.group = group or ops  # what is whole needs no more than the operations themselves

    def forward(self, batch: MicroBatch, hidden: Array | None = None) -> Array:
        """One micro-batch through this stage.

        Args:
            batch: as `ops.upload` returned it.
            hidden: (tokens, hidden) from the stage before; None on the first one.

        Returns:
            (tokens, hidden), or from the last stage (2, targets) float32 as `ops.log_probs` writes.
        """
        hidden = self.layers_before_head(batch, hidden)
        return self.log_probs(self.weights.layers[-1], batch, hidden) if self.is_last else hidden

    def next_logits(self, batch: MicroBatch, hidden: Array | None, cache: Sequence[Array]) -> Array:
        """One pass of generation, which leaves the keys and values of its tokens in the cache.

        Args:
            batch: its keys are in the cache, as in `cupyllama.generation.batch.CachedBatch`;
                without `logit_rows` every token's next one is wanted.
            hidden: as `forward` takes it.
            cache: of each layer (slots, 2 · kv), keys and then values.

        Returns:
            (tokens, hidden), or from the last stage (rows, vocab) float32.
        """
        hidden = self.layers_before_head(batch, hidden, cache)
        if not self.is_last:
            return hidden
        layer = self.weights.layers[-1]
        mixed = self.mix(layer, batch, hidden, cache[-1])
        if batch.logit_rows is not None:
            mixed, hidden = (self.ops.gather(batch.logit_rows, x) for x in (mixed, hidden))
        return self.group.logits(self.head(layer, mixed, hidden))

    @property
    def is_last(self) -> bool:
        """Whether the model ends with this stage: its last layer goes with the head."""
        return self.weights.lm_head is not None

    def layers_before_head(
        self, batch: MicroBatch, hidden: Array | None, cache: Sequence[Array] | None = None
    ) -> Array:
        """The stage less what `head` does: (tokens, hidden)."""
        layers = self.weights.layers[:-1] if self.is_last else self.weights.layers
        if self.weights.embed_tokens is not None:
            hidden = self.embed(batch)
        for number, layer in enumerate(layers):
            own = None if cache is None else cache[number]
            hidden = self.transform(layer, self.mix(layer, batch, hidden, own), hidden)
        return hidden

    def log_probs(self, layer: LayerWeights, batch: MicroBatch, hidden: Array) -> Array:
        """The last layer and the head, on rows with targets alone: (2, targets) float32.

        A chunk of rows at a time, for the logits of all would be gigabytes.
        """
        ops = self.ops
        mixed = self.mix(layer, batch, hidden)
        out = ops.empty((2, len(batch.target_token)), np.float32)
        for first in range(0, len(batch.logit_rows), ops.LOGIT_CHUNK):
            rows = batch.logit_rows[first : first + ops.LOGIT_CHUNK]
            logits = self.head(layer, ops.gather(rows, mixed), ops.gather(rows, hidden))
            target_start = batch.target_start[first : first + len(rows) + 1]
            self.group.log_probs(logits, target_start, batch.target_token, out)
            del logits  # hundreds of megabytes, which the next chunk can have
        return out
