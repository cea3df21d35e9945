"""LLaMA (Touvron et al. 2023) and what shares its equations, for a contiguous slice of layers."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cupyllama.config import ModelConfig
from cupyllama.model.rope import rope_tables
from cupyllama.model.stage import Array, Group, LayerStack
from cupyllama.packing import PADDING_SEGMENT, MicroBatch
from cupyllama.quantized import Quantized, quantizes_activations


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


class Stage(LayerStack):
    """A contiguous slice of the decoder layers, with the ends of the model that it has."""

    def __init__(
        self,
        config: ModelConfig,
        weights: StageWeights,
        ops: ModuleType,
        positions: int,
        group: Group | None = None,
    ):
        super().__init__(config, weights, ops, group)
        tables = rope_tables(config, max(positions, PADDING_SEGMENT))  # padding has positions too
        self.cos, self.sin = (ops.to_device(table) for table in tables)

    def embed(self, batch: MicroBatch) -> Array:
        """Of each token: (tokens, hidden)."""
        return self.ops.gather(batch.token_ids, self.weights.embed_tokens)

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
