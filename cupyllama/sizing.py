"""How many tokens a micro-batch has, and what memory it takes."""

from math import prod

from cupyllama.checkpoint.fields import matrix_shapes
from cupyllama.config import ModelConfig
from cupyllama.parallel.devices import storage_dtype

DEFAULT_TOKENS = 8192
# Of a GPU that is alone: 1 % faster than the default, but a pipeline wants many micro-batches.
LONE_GPU_TOKENS = 32768
LEAST_TOKENS = 256


def default_tokens(kind: str, ranks: int) -> int:
    """Of `ranks` ranks on cuda or cpu."""
    return LONE_GPU_TOKENS if kind == "cuda" and ranks == 1 else DEFAULT_TOKENS


def micro_batch_tokens(
    asked: int | None,
    longest_row: int,
    config: ModelConfig,
    dtype: str,
    logit_chunk: int,
    free: int | None,
    quantize: str | None = None,
    fused: bool = True,
    default: int = DEFAULT_TOKENS,
) -> int:
    """The size asked for, or the default, halved until its activations fit `free` bytes."""
    if asked is not None:
        return asked
    size = max(default, longest_row)
    while (
        free is not None
        and size // 2 >= max(longest_row, LEAST_TOKENS)
        and activation_bytes(config, size, dtype, logit_chunk, quantize, fused) > 0.9 * free
    ):
        size //= 2
    return size


def activation_bytes(
    config: ModelConfig,
    tokens: int,
    dtype: str,
    logit_chunk: int,
    quantize: str | None = None,
    fused: bool = True,
) -> int:
    """Memory that a device's pool comes to hold for micro-batches, which it keeps between them.

    In attention there are hidden states, their norm, q, k, v and what is mixed of them. The MLP
    writes where q, k, v were, if what it writes is no wider. Logits need a block of their own.

    Args:
        fused: gate and up are not written, as on Hopper GPUs in 16 bits.
    """
    itemsize = storage_dtype(dtype).itemsize
    row = itemsize * (config.hidden_size + config.qkv_size + config.q_size)
    row += config.hidden_size * (1 if quantize == "fp8" else itemsize)
    if config.share is not None:
        row += itemsize * config.hidden_size  # what the other ranks send, to be added up
    widest = config.intermediate_size if fused else config.mlp_width
    if widest > config.qkv_size:
        row += itemsize * widest
    if quantize == "fp8":
        row += config.intermediate_size
    logits = 4 * logit_chunk * config.head_rows
    # With int8, a matrix is multiplied in `dtype`.
    largest = max(map(prod, matrix_shapes(config).values())) if quantize == "int8" else 0
    return tokens * row + logits + itemsize * largest
