"""How many tokens a micro-batch has, and what memory it takes."""

from cupyllama.config import ModelConfig
from cupyllama.parallel.devices import storage_dtype

DEFAULT_TOKENS = 8192
LEAST_TOKENS = 256


def micro_batch_tokens(
    asked: int | None,
    longest_row: int,
    config: ModelConfig,
    dtype: str,
    logit_chunk: int,
    free: int | None,
) -> int:
    """The size asked for, or the default, halved until its activations fit `free` bytes."""
    if asked is not None:
        return asked
    size = max(DEFAULT_TOKENS, longest_row)
    while (
        free is not None
        and size // 2 >= max(longest_row, LEAST_TOKENS)
        and activation_bytes(config, size, dtype, logit_chunk) > 0.9 * free
    ):
        size //= 2
    return size


def activation_bytes(config: ModelConfig, tokens: int, dtype: str, logit_chunk: int) -> int:
    """Memory of a micro-batch at its peak: in the MLP, with the attention's arrays still held."""
    itemsize = storage_dtype(dtype).itemsize
    row = 2 * config.hidden_size + config.qkv_size + config.q_size + config.mlp_activations
    logits = logit_chunk * (4 * config.vocab_size + itemsize * config.hidden_size)
    return tokens * row * itemsize + logits
