"""Published shapes, and stages of them with random weights made on the device."""

from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.checkpoint.fields import Field, stage_fields
from cupyllama.config import ModelConfig
from cupyllama.config_llama import LlamaConfig
from cupyllama.config_opt import OptConfig
from cupyllama.errors import UsageError
from cupyllama.families import Stage, family_of
from cupyllama.parallel.group import Group

# layers, hidden, intermediate, heads, key-value heads, vocabulary
SHAPES = {
    "llama-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama-30b": (60, 6656, 17920, 52, 52, 32000),
    "llama-65b": (80, 8192, 22016, 64, 64, 32000),
    "llama-2-70b": (80, 8192, 28672, 64, 8, 32000),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256),
}

# layers, hidden, ffn, heads, vocabulary
OPT_SHAPES = {
    "opt-6.7b": (32, 4096, 16384, 32, 50272),
    "opt-13b": (40, 5120, 20480, 40, 50272),
    "opt-30b": (48, 7168, 28672, 56, 50272),
    "opt-66b": (64, 9216, 36864, 72, 50272),
}

WEIGHT_DEVIATION = 0.02  # of an untrained model
_FIELDS = 16  # seeds that a layer has: as many as it has fields, or more


def model_config(shape: str) -> ModelConfig:
    """The configuration of a published shape.

    Raises:
        UsageError: there is none of that name.
    """
    if shape in OPT_SHAPES:
        return _opt_config(*OPT_SHAPES[shape])
    if shape not in SHAPES:
        known = ", ".join([*SHAPES, *OPT_SHAPES])
        raise UsageError(f"shape {shape!r} is not known", f"Give one of {known}.")
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


def _opt_config(layers: int, hidden: int, ffn: int, heads: int, vocab: int) -> OptConfig:
    return OptConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=hidden,
        do_layer_norm_before=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=2,
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
    group: Group | None = None,
) -> Stage:
    """Some layers, or all, with random matrices and biases, and norms of ones.

    A layer's weights are the same in whichever stage it is.

    Args:
        quantize: "fp8" or "int8" for matrices that are so.
        group: of the ranks that share the matrices, each of which has the same numbers in its part.
    """
    names = family_of(config).names

    def array(layer: int | None, field: Field, number: int) -> Any:
        if len(field.shape) == 1 and not field.name.endswith("bias"):
            return ops.to_device(np.ones(field.shape, dtype))
        seed = _FIELDS * (-1 if layer is None else layer) + number
        full = random_array(field.shape, dtype, seed, WEIGHT_DEVIATION)
        if quantize is None or layer is None or field.name not in names.matrices:
            return full
        eight_bit = ops.quantize(full, kind=quantize)
        del full
        ops.release_memory()  # else the pool would serve what follows from parts of it
        return eight_bit

    layers = range(config.num_hidden_layers) if layers is None else layers
    arrays: dict[int | None, dict[str, Any]] = {layer: {} for layer in (None, *layers)}
    for layer, field in stage_fields(config, layers):
        number = (
            (names.first + names.last).index(field.name) if layer is None else len(arrays[layer])
        )
        arrays[layer][field.name] = array(layer, field, number)
    ends = arrays.pop(None)
    if config.tie_word_embeddings and layers.stop == config.num_hidden_layers:
        # The same numbers, but with a name of its own where time is measured.
        ends["lm_head"] = ends["embed_tokens"].view()
        if layers.start > 0:
            del ends["embed_tokens"]
    model = family_of(config).model
    weights = [model.LayerWeights(**arrays[layer]) for layer in layers]
    return model.Stage(config, model.StageWeights(weights, **ends), ops, positions, group)
