"""LLaMA (Touvron et al. 2023) and what shares its equations, for a contiguous slice of layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.config import ModelConfig
from cupyllama.model.rope import rope_tables
from cupyllama.packing import PADDING_SEGMENT, MicroBatch
from cupyllama.quantized import Quantized, quantizes_activations

Array = Any  # numpy.ndarray or cupy.ndarray: whatever `ops` works on
Group = Any  # cupyllama.parallel.group.Group


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], and may be quantized."""

    input_layernorm: Array  # (hidden,)
    qkv_proj: Array | Quantized  # (q + k + v, hidden)
    o_proj: Array | Quantized  # (hidden, q)
    post_attention_layernorm: Array  # (hidden,)
    gate_up_proj: Array | Quantized  # (2 · intermediate, hidden), gate first
    down_proj: Array | Quantized  # (hidden, intermediate)
    qkv_bias: Array | None = None  # (q + k + v,)
    o_bias: Array | None = None  # (hidden,)


@dataclass(frozen=True)
class StageWeights:
    """The tensors of some layers; a stage has the ends of the model that it needs."""

    layers: list[LayerWeights]
    embed_tokens: Array | None = None  # (vocab, hidden), on the first stage
    norm: Array | None = None  # (hidden,), on the last stage
    lm_head: Array | None = None  # (vocab, hidden), on the last stage


class Stage:
    """A contiguous slice of the decoder layers, with the ends of the model that it has."""

    def __init__(
        self,
        config: ModelConfig,
        weights: StageWeights,
        ops: ModuleType,
        positions: int,
        group: Group | None = None,
    ):
        """
        Args:
            positions: the longest row that will be fed, in tokens.
            group: of the ranks that have parts of the matrices; None: they are whole.
        """
        self.config = config
        self.weights = weights
        self.ops = ops
        self.group = group or ops  # what is whole needs no more than the operations themselves
        tables = rope_tables(config, max(positions, PADDING_SEGMENT))  # padding has positions too
        self.cos, self.sin = (ops.to_device(table) for table in tables)

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
            hidden = self.ops.gather(batch.token_ids, self.weights.embed_tokens)
        for number, layer in enumerate(layers):
            own = None if cache is None else cache[number]
            hidden = self.transform(layer, self.mix(layer, batch, hidden, own), hidden)
        return hidden

    def mix(
        self, layer: LayerWeights, batch: MicroBatch, hidden: Array, cache: Array | None = None
    ) -> Array:
        """What attention finds for each token: (tokens, hidden) -> (tokens, q)."""
        ops, config = self.ops, self.config
        eight_bit = quantizes_activations(layer.qkv_proj)
        normed = ops.rmsnorm(hidden, layer.input_layernorm, config.rms_norm_eps, eight_bit)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        turn = (batch.positions, self.cos, self.sin, *heads)
        qkv = ops.linear_rope(normed, layer.qkv_proj, layer.qkv_bias, *turn, hidden.dtype)
        return ops.attention(qkv, batch, *heads, cache)

    def transform(self, layer: LayerWeights, mixed: Array, hidden: Array) -> Array:
        """The rest of the layer, token by token: (tokens, q), (tokens, hidden) -> the last."""
        ops, config = self.ops, self.config
        eight_bit = quantizes_activations(layer.gate_up_proj)
        hidden = self.group.linear(mixed, layer.o_proj, layer.o_bias, residual=hidden)
        normed = ops.rmsnorm(hidden, layer.post_attention_layernorm, config.rms_norm_eps, eight_bit)
        gated = ops.linear_swiglu(normed, layer.gate_up_proj, eight_bit, hidden.dtype)
        return self.group.linear(gated, layer.down_proj, residual=hidden)

    def head(self, layer: LayerWeights, mixed: Array, hidden: Array) -> Array:
        """The rest of the last layer, and logits: (rows, q), (rows, hidden) -> (rows, vocab)."""
        ops, weights = self.ops, self.weights
        hidden = self.transform(layer, mixed, hidden)
        normed = ops.rmsnorm(hidden, weights.norm, self.config.rms_norm_eps)
        return ops.linear(normed, weights.lm_head, out_dtype=np.float32)

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
