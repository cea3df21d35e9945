"""Published LLaMA shapes, and stages of them with random weights made on the device."""

from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.config import ModelConfig
from cupyllama.config_llama import LlamaConfig
from cupyllama.errors import UsageError
from cupyllama.model.llama import LayerWeights, Stage, StageWeights

# layers, hidden, intermediate, heads, key-value heads, vocabulary
SHAPES = {
    "llama-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama-30b": (60, 6656, 17920, 52, 52, 32000),
    "llama-65b": (80, 8192, 22016, 64, 64, 32000),
    "llama-2-70b": (80, 8192, 28672, 64, 8, 32000),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256),
}

WEIGHT_DEVIATION = 0.02  # of an untrained model


def model_config(shape: str) -> ModelConfig:
    """The configuration of a published shape.

    Raises:
        UsageError: there is none of that name.
    """
    if shape not in SHAPES:
        raise UsageError(f"shape {shape!r} is not known", f"Give one of {', '.join(SHAPES)}.")
    layers, hidden, intermediate, heads, kv_heads, vocab = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=2048,
        sliding_window=None,
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=1,
        dtype="float16",
    )


def random_array(shape: tuple[int, ...], dtype: np.dtype, seed: int, deviation: float) -> Any:
    """Uniform about 0 on the device; the same numbers for the same seed, whatever the shape."""
    import cupy

    fill = cupy.ElementwiseKernel(
        "uint32 seed, float32 width",
        "T y",
        # PCG hash (Jarzynski & Olano 2020) of the element's index
        """
        unsigned state = ((unsigned)i + seed) * 747796405u + 2891336453u;
        unsigned word = ((state >> ((state >> 28) + 4u)) ^ state) * 277803737u;
        y = (T)(((word >> 22) ^ word) * (width / 4294967296.0f) - 0.5f * width);
        """,
        "random_fill",
    )
    seed = np.uint32(2654435761 * (seed + 1) % 2**32)
    return fill(seed, np.float32(deviation * 12**0.5), cupy.empty(shape, dtype))


def random_stage(
    config: ModelConfig,
    dtype: np.dtype,
    ops: ModuleType,
    positions: int,
    layers: range | None = None,
    quantize: str | None = None,
) -> Stage:
    """Some layers, or all, with random matrices and norms of ones.

    A layer's weights are the same in whichever stage it is.

    Args:
        quantize: "fp8" for matrices of e4m3.
    """
    hidden = config.hidden_size

    def end(number: int) -> Any:
        shape = config.vocab_size, hidden
        return random_array(shape, dtype, number - 8, WEIGHT_DEVIATION)

    def matrix(layer: int, number: int, *shape: int) -> Any:
        full = random_array(shape, dtype, 8 * layer + number, WEIGHT_DEVIATION)
        if quantize is None:
            return full
        eight_bit = ops.quantize(full)
        del full
        ops.release_memory()  # else the pool would serve what follows from parts of it
        return eight_bit

    def ones() -> Any:
        return ops.to_device(np.ones(hidden, dtype))

    layers = range(config.num_hidden_layers) if layers is None else layers
    weights = [
        LayerWeights(
            input_layernorm=ones(),
            qkv_proj=matrix(layer, 0, config.qkv_size, hidden),
            o_proj=matrix(layer, 1, hidden, config.q_size),
            post_attention_layernorm=ones(),
            gate_up_proj=matrix(layer, 2, 2 * config.intermediate_size, hidden),
            down_proj=matrix(layer, 3, hidden, config.intermediate_size),
        )
        for layer in layers
    ]
    ends = {}
    if layers.start == 0:
        ends["embed_tokens"] = end(4)
    if layers.stop == config.num_hidden_layers:
        ends["norm"] = ones()
        ends["lm_head"] = end(5)
    return Stage(config, StageWeights(weights, **ends), ops, positions)
