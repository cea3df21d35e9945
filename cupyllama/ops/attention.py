"""Attention on a GPU, and the rotary embedding before it: which kernel does it, and its launch."""

import math
from typing import Any

import cupy
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops.arrays import check, multiprocessors, storage
from cupyllama.ops.attention_plan import QUERY_TILE
from cupyllama.ops.gemm_sm90 import tensor_map

Array = cupy.ndarray


def rope(
    qkv: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    num_heads: int,
    num_key_value_heads: int,
) -> Array:
    """Rotate the queries and keys of qkv by their positions, in place.

    Args:
        qkv: (tokens, (num_heads + 2 · num_key_value_heads) · head_dim), q then k then v.
        positions: (tokens,) int32.
        cos, sin: (positions, head_dim / 2) float32.
    """
    tokens, half = len(qkv), cos.shape[1]
    constants = definitions.rope_constants(storage(qkv), 2 * half, num_heads, num_key_value_heads)
    check(qkv, qkv.dtype, (tokens, constants["ROW"]))
    check(positions, np.int32, (tokens,))
    check(cos, np.float32, (len(cos), half))
    check(sin, np.float32, cos.shape)
    if tokens:
        packs = constants["ROTATED_HEADS"] * half // definitions.pack_width(half, qkv.itemsize)
        launch = kernel("rope.cu", "rope", **constants)
        launch((tokens,), (min(-(-packs // 32) * 32, 256),), (qkv, positions, cos, sin))
    return qkv


def attention(
    qkv: Array,
    batch: Any,
    num_heads: int,
    num_key_value_heads: int,
    cache: Array | None = None,
) -> Array:
    """softmax(q · kᵀ / sqrt(head_dim)) · v over the packed segments of `batch`, causal.

    Args:
        qkv: (tokens, (num_heads + 2 · num_key_value_heads) · head_dim), q and k rotated.
        batch: a DeviceBatch; with a cache it has `slots`.
        cache: (slots, 2 · num_key_value_heads · head_dim), keys and then values, in the dtype of
            qkv: k and v of the tokens are put there first, and `key_index` is of its rows.

    Returns:
        (tokens, num_heads · head_dim).
    """
    head_dim = qkv.shape[1] // (num_heads + 2 * num_key_value_heads)
    if cache is not None:
        store_keys(cache, qkv, batch.slots)
    capability = int(cupy.cuda.Device().compute_capability)
    on = attention_portable
    if capability >= 80 and qkv.itemsize == 2:
        on = attention_sm90 if capability == 90 and head_dim in (64, 128) else attention_mma
    return on(qkv, batch, num_heads, num_key_value_heads, cache)


def store_keys(cache: Array, qkv: Array, slots: Array) -> None:
    """cache[slots[i]] = keys and values of token i: (slots, columns), (tokens, more), (tokens,).

    No slot is there twice.
    """
    (tokens, row), columns = qkv.shape, cache.shape[1]
    check(qkv, cache.dtype, (tokens, row))
    check(cache, cache.dtype, (len(cache), columns))
    check(slots, np.int32, (tokens,))
    if tokens:
        constants = definitions.attention_store_constants(columns, row, qkv.itemsize)
        launch = kernel("attention_store.cu", "attention_store", **constants)
        threads = min(-(-constants["UNITS"] // 32) * 32, 256)
        launch((tokens,), (threads,), (cache, qkv, slots))


def attention_sm90(
    qkv: Array,
    batch: Any,
    num_heads: int,
    num_key_value_heads: int,
    cache: Array | None = None,
) -> Array:
    """`attention` by wgmma: float16 or bfloat16, heads of 64 or 128, compute capability 9.0.

    With a cache, all keys are there already.
    """
    out, heads = _out(qkv, batch, num_heads, num_key_value_heads, cache)
    if out.size:
        constants = definitions.attention_sm90_constants(
            *heads, batch.item_queries, cached=cache is not None
        )
        shared = definitions.attention_sm90_shared_bytes(constants)
        launch = kernel("attention_sm90.cu", "attention_sm90", shared, **constants)
        groups, items = constants["GROUPS"], len(batch.items)
        # Two blocks of one group that multiplies, or one of two, fill a multiprocessor.
        blocks = min(multiprocessors(qkv.device.id) * (2 // groups), items * num_heads)
        keys = qkv if cache is None else cache
        arguments = (
            out,
            qkv,
            tensor_map(keys.data.ptr, len(keys), keys.shape[1] * keys.itemsize, constants["KEYS"]),
            *(batch.items, batch.steps, batch.key_index, batch.positions, batch.counter),
            np.int32(items),
            scale(constants["HEAD_DIM"]),
            cache,
        )
        launch((blocks,), (128 * groups + 128,), arguments, shared_mem=shared)
    return out


def attention_mma(
    qkv: Array,
    batch: Any,
    num_heads: int,
    num_key_value_heads: int,
    cache: Array | None = None,
) -> Array:
    """`attention` on matrix units: float16 or bfloat16, compute capability 8.0 and above.

    With a cache, all keys are there already.
    """
    out, heads = _out(qkv, batch, num_heads, num_key_value_heads, cache)
    if out.size:
        constants = definitions.attention_mma_constants(*heads, cached=cache is not None)
        shared = definitions.attention_mma_shared_bytes(constants)
        launch = kernel("attention_mma.cu", "attention_mma", shared, **constants)
        arguments = _tile_arguments(out, qkv, batch, constants["HEAD_DIM"], cache)
        launch((num_heads * len(batch.tiles),), (128,), arguments, shared_mem=shared)
    return out


def attention_portable(
    qkv: Array,
    batch: Any,
    num_heads: int,
    num_key_value_heads: int,
    cache: Array | None = None,
) -> Array:
    """`attention` on any GPU, in any storage.  With a cache, all keys are there already."""
    out, heads = _out(qkv, batch, num_heads, num_key_value_heads, cache)
    if out.size:
        constants = definitions.attention_constants(*heads, cached=cache is not None)
        launch = kernel("attention.cu", "attention", **constants)
        block_queries = 4 * constants["WARP_QUERIES"]
        grid = (num_heads * len(batch.tiles), QUERY_TILE // block_queries)
        launch(grid, (128,), _tile_arguments(out, qkv, batch, constants["HEAD_DIM"], cache))
    return out


def _out(
    qkv: Array, batch: Any, num_heads: int, num_key_value_heads: int, cache: Array | None
) -> tuple[Array, tuple[str, int, int, int]]:
    """Memory for the result, and what every kernel is compiled for."""
    tokens, width = qkv.shape
    head_dim, rest = divmod(width, num_heads + 2 * num_key_value_heads)
    check(qkv, qkv.dtype, (tokens, width))
    assert len(batch.token_ids) == tokens, f"{len(batch.token_ids)} {tokens}"
    assert rest == 0 and num_heads % num_key_value_heads == 0, f"{width=} {num_heads=}"
    assert head_dim % 2 == 0 and head_dim <= 256, f"{head_dim=}"
    if cache is not None:
        check(cache, qkv.dtype, (len(cache), 2 * num_key_value_heads * head_dim))
    out = cupy.empty((tokens, num_heads * head_dim), qkv.dtype)
    return out, (storage(qkv), head_dim, num_heads, num_key_value_heads)


def _tile_arguments(
    out: Array, qkv: Array, batch: Any, head_dim: int, cache: Array | None
) -> tuple[Any, ...]:
    segments = (batch.tiles, batch.segment_start, batch.key_start, batch.key_index)
    return (out, qkv, *segments, scale(head_dim), cache)


def scale(head_dim: int) -> np.float32:
    """What scores are multiplied with, so that exp2 of them is what softmax takes."""
    return np.float32(math.log2(math.e) / math.sqrt(head_dim))
