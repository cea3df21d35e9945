"""Tensor parallelism (Shoeybi et al. 2019): which part of a model each rank of a group has.

Attention heads and the inside of the MLP are shared out: a rank has some rows of q, k, v, up and
gate, and the columns of o and down that belong to them. What it adds to the hidden states is then a
part of a sum over the group. lm_head is shared by rows; the embedding is not, for each rank needs
whole rows of it, and to gather them costs less than to add up parts of them.
"""

from cupyllama.config import ModelConfig, Share
from cupyllama.errors import UsageError


def check_tensor_parallel(config: ModelConfig, size: int) -> None:
    """Raises UsageError where `size` ranks cannot have equal parts of every layer."""
    reason = _hindrance(config, size)
    if reason is not None:
        sizes = range(1, config.num_attention_heads + 1)
        possible = ", ".join(str(n) for n in sizes if _hindrance(config, n) is None)
        raise UsageError(f"--tensor-parallel {size}: {reason}", f"This model allows {possible}.")


def part_of(config: ModelConfig, share: Share | None) -> ModelConfig:
    """The model as a rank has it; all of it where nothing is shared."""
    return config if share is None else config.part(share)


def span(config: ModelConfig, size: str, share: Share) -> range:
    """Of a size of the whole model, which of its numbers a rank has.

    Args:
        size: an attribute of the config, as name tables have it.
    """
    whole, own = getattr(config, size), getattr(config.part(share), size)
    if whole == own:
        return range(whole)
    if size == "head_rows":
        return share.vocabulary(whole)
    # Where there are more ranks than key-value heads, neighbours have the same one.
    heads = config.num_key_value_heads if size == "kv_size" else share.size
    first = share.rank * heads // share.size * (whole // heads)
    return range(first, first + own)


def _hindrance(config: ModelConfig, size: int) -> str | None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        return f"{size} ranks cannot share {heads} attention heads evenly"
    if kv_heads % size and size % kv_heads:
        return f"{size} ranks can neither share {kv_heads} key-value heads nor have one each"
    if config.intermediate_size % size:
        return f"{size} ranks cannot share the {config.intermediate_size} columns of the MLP evenly"
    if config.vocab_size < 8 * size:
        return f"{size} ranks are too many for a vocabulary of {config.vocab_size}"
    return None
