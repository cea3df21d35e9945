"""OPT (Zhang et al. 2022), for a contiguous slice of layers."""

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cupyllama.config_opt import POSITION_OFFSET, OptConfig
from cupyllama.model.stage import Array, Group, LayerStack
from cupyllama.packing import MicroBatch
from cupyllama.quantized import Quantized, quantizes_activations

LAYER_NORM_EPS = 1e-5  # which config.json does not say


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], and may be quantized."""

    self_attn_layer_norm: Array  # (hidden,), and so is its bias
    self_attn_layer_norm_bias: Array
    qkv_proj: Array | Quantized  # (3 · hidden, hidden)
    qkv_bias: Array  # (3 · hidden,)
    out_proj: Array | Quantized  # (hidden, hidden)
    out_bias: Array  # (hidden,)
    final_layer_norm: Array  # (hidden,)
    final_layer_norm_bias: Array
    fc1: Array | Quantized  # (ffn, hidden)
    fc1_bias: Array  # (ffn,)
    fc2: Array | Quantized  # (hidden, ffn)
    fc2_bias: Array  # (hidden,)


@dataclass(frozen=True)
class StageWeights:
    """The tensors of some layers; a stage has the ends of the model that it needs.

    `embedding` is `hidden`, or else there are projections between the two.
    """

    layers: list[LayerWeights]
    embed_tokens: Array | None = None  # (vocab, embedding), on the first stage
    embed_positions: Array | None = None  # (positions + 2, hidden), on the first stage
    project_in: Array | None = None  # (hidden, embedding), on the first stage
    final_layer_norm: Array | None = None  # (hidden,), on the last stage where norms come first
    final_layer_norm_bias: Array | None = None
    project_out: Array | None = None  # (embedding, hidden), on the last stage
    lm_head: Array | None = None  # (vocab, embedding), on the last stage


class Stage(LayerStack):
    """A contiguous slice of the decoder layers, with the ends of the model that it has.

    A norm stands before each block, or in the 350m (`do_layer_norm_before` false) after each
    residual sum.
    """

    def __init__(
        self,
        config: OptConfig,
        weights: StageWeights,
        ops: ModuleType,
        positions: int,
        group: Group | None = None,
    ):
        assert positions <= config.max_position_embeddings  # gather looks at no bounds
        super().__init__(config, weights, ops, group)

    def embed(self, batch: MicroBatch) -> Array:
        """Of each token and its position: (tokens, hidden)."""
        ops, weights = self.ops, self.weights
        tokens = ops.gather(batch.token_ids, weights.embed_tokens)
        positions = ops.gather(batch.positions, weights.embed_positions[POSITION_OFFSET:])
        if weights.project_in is None:
            return ops.add(tokens, positions)
        return ops.linear(tokens, weights.project_in, residual=positions)

    def mix(
        self, layer: LayerWeights, batch: MicroBatch, hidden: Array, cache: Array | None = None
    ) -> Array:
        """What attention finds for each token: (tokens, hidden) -> the same."""
        ops, heads = self.ops, self.config.num_attention_heads
        normed = hidden
        if self.config.do_layer_norm_before:
            eight_bit = quantizes_activations(layer.qkv_proj)
            norm = layer.self_attn_layer_norm, layer.self_attn_layer_norm_bias
            normed = ops.layernorm(hidden, *norm, LAYER_NORM_EPS, eight_bit)
        qkv = ops.linear(normed, layer.qkv_proj, layer.qkv_bias, out_dtype=hidden.dtype)
        return ops.attention(qkv, batch, heads, heads, cache)

    def transform(self, layer: LayerWeights, mixed: Array, hidden: Array) -> Array:
        """The rest of the layer, token by token: (tokens, hidden) twice -> the same."""
        ops, eight_bit = self.ops, quantizes_activations(layer.fc1)
        hidden = self.group.linear(mixed, layer.out_proj, layer.out_bias, residual=hidden)
        norm = layer.final_layer_norm, layer.final_layer_norm_bias
        if self.config.do_layer_norm_before:
            normed = ops.layernorm(hidden, *norm, LAYER_NORM_EPS, eight_bit)
            return self.feed_forward(layer, normed, hidden)
        first = layer.self_attn_layer_norm, layer.self_attn_layer_norm_bias
        normed = ops.layernorm(hidden, *first, LAYER_NORM_EPS)
        return ops.layernorm(self.feed_forward(layer, normed, normed), *norm, LAYER_NORM_EPS)

    def feed_forward(self, layer: LayerWeights, x: Array | Quantized, residual: Array) -> Array:
        """fc2 · ReLU(fc1 · x) + residual: (tokens, hidden) twice -> the same."""
        ops, eight_bit = self.ops, quantizes_activations(layer.fc2)
        inner = ops.linear_relu(x, layer.fc1, layer.fc1_bias, eight_bit, residual.dtype)
        return self.group.linear(inner, layer.fc2, layer.fc2_bias, residual=residual)

    def head(self, layer: LayerWeights, mixed: Array, hidden: Array) -> Array:
        """The rest of the last layer, and logits: (rows, hidden) twice -> (rows, vocab) float32."""
        ops, weights = self.ops, self.weights
        hidden = self.transform(layer, mixed, hidden)
        if weights.final_layer_norm is not None:
            norm = weights.final_layer_norm, weights.final_layer_norm_bias
            hidden = ops.layernorm(hidden, *norm, LAYER_NORM_EPS)
        if weights.project_out is not None:
            hidden = ops.linear(hidden, weights.project_out)
        return ops.linear(hidden, weights.lm_head, out_dtype=np.float32)
