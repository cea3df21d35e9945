"""LLaMA (Touvron et al. 2023) and what shares its equations, for a contiguous slice of layers."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.config import ModelConfig
from cupyllama.model.rope import rope_tables
from cupyllama.packing import PADDING_SEGMENT, MicroBatch

Array = Any  # numpy.ndarray or cupy.ndarray: whatever `ops` works on


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in]."""

    input_layernorm: Array  # (hidden,)
    qkv_proj: Array  # (q + k + v, hidden)
    o_proj: Array  # (hidden, q)
    post_attention_layernorm: Array  # (hidden,)
    gate_up_proj: Array  # (2 · intermediate, hidden), gate first
    down_proj: Array  # (hidden, intermediate)
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

    def __init__(self, config: ModelConfig, weights: StageWeights, ops: ModuleType, positions: int):
        """`positions`: the longest row that will be fed, in tokens."""
        self.config = config
        self.weights = weights
        self.ops = ops
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
        if self.weights.embed_tokens is not None:
            hidden = self.ops.embedding(batch.token_ids, self.weights.embed_tokens)
        for layer in self.weights.layers:
            hidden = self.decoder_layer(layer, batch, hidden)
        if self.weights.lm_head is not None:
            return self.head(batch, hidden)
        return hidden

    def decoder_layer(self, layer: LayerWeights, batch: MicroBatch, hidden: Array) -> Array:
        """(tokens, hidden) -> the same."""
        ops, config = self.ops, self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        normed = ops.rmsnorm(hidden, layer.input_layernorm, config.rms_norm_eps)
        qkv = ops.linear(normed, layer.qkv_proj, layer.qkv_bias)
        ops.rope(qkv, batch.positions, self.cos, self.sin, heads, kv_heads)
        mixed = ops.attention(qkv, batch, heads, kv_heads)
        hidden = ops.linear(mixed, layer.o_proj, layer.o_bias, residual=hidden)

        normed = ops.rmsnorm(hidden, layer.post_attention_layernorm, config.rms_norm_eps)
        gated = ops.swiglu(ops.linear(normed, layer.gate_up_proj))
        return ops.linear(gated, layer.down_proj, residual=hidden)

    def head(self, batch: MicroBatch, hidden: Array) -> Array:
        """Log-probabilities of the targets, a chunk of logits at a time: (2, targets) float32."""
        ops, weights = self.ops, self.weights
        out = ops.empty((2, len(batch.target_token)), np.float32)
        for first in range(0, len(batch.logit_rows), ops.LOGIT_CHUNK):
            rows = batch.logit_rows[first : first + ops.LOGIT_CHUNK]
            normed = ops.rmsnorm(hidden, weights.norm, self.config.rms_norm_eps, rows)
            logits = ops.linear(normed, weights.lm_head, out_dtype=np.float32)
            target_start = batch.target_start[first : first + len(rows) + 1]
            ops.log_probs(logits, target_start, batch.target_token, out)
            del logits  # hundreds of megabytes, which the next chunk can have
        return out
