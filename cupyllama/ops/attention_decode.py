"""Attention of one query a row over the cache: what a step of generation takes."""

import functools
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops.arrays import check, multiprocessors, storage
from cupyllama.ops.attention import scale

Array = cupy.ndarray

# Warps of a multiprocessor from which on more of them, or more blocks of them, gain nothing.
_FULL = 16
# Blocks of 4 warps, for each multiprocessor, from which on rows are not split further: the longer
# ones end late where there are few.
_SPLIT_BLOCKS = 8


@dataclass(frozen=True)
class DecodeBatch:
    """One token of each of some rows, in device memory.

    The i-th key of row r is in slot key_table[r, i], and so will be that of the row's token.
    """

    token_ids: Array  # (rows,) int32
    positions: Array  # (rows,) int32, place of each token in its row; anything for idle rows
    last_key: Array  # (rows,) int32, the same, but -1 for idle rows
    key_table: Array  # (at least rows, max_keys) int32
    logit_rows: None = None  # the next token of every row is wanted


def attention_decode(
    qkv: Array, batch: DecodeBatch, num_heads: int, num_key_value_heads: int, cache: Array
) -> Array:
    """softmax(q · kᵀ / sqrt(head_dim)) · v of each row's token over the keys of its row.

    Its own key and value are put into the cache; idle rows read and write none there. How the work
    is cut depends on shapes alone, and no bits on how it is cut.

    Args:
        qkv: (rows, (num_heads + 2 · num_key_value_heads) · head_dim), q and k rotated.
        cache: (slots, 2 · num_key_value_heads · head_dim), keys and then values.

    Returns:
        (rows, num_heads · head_dim), zeros for idle rows.
    """
    rows, width = qkv.shape
    max_keys = batch.key_table.shape[1]
    head_dim, rest = divmod(width, num_heads + 2 * num_key_value_heads)
    assert rest == 0 and num_heads % num_key_value_heads == 0, f"{width=} {num_heads=}"
    assert head_dim % 2 == 0 and head_dim <= 256, f"{head_dim=}"
    check(qkv, qkv.dtype, (rows, width))
    check(cache, qkv.dtype, (len(cache), 2 * num_key_value_heads * head_dim))
    check(batch.last_key, np.int32, (rows,))
    check(batch.key_table, np.int32, batch.key_table.shape)
    assert len(batch.key_table) >= rows and max_keys > 0, f"{rows} {batch.key_table.shape}"
    out = cupy.empty((rows, num_heads * head_dim), qkv.dtype)
    if not rows:
        return out
    sizes = (storage(qkv), head_dim, num_heads, num_key_value_heads)
    splits, warps = cut(rows, max_keys, *sizes)
    constants = definitions.attention_decode_constants(*sizes, warps)
    blocks = num_heads // constants["HEADS"]
    spans = -(-max_keys // (constants["CHUNK"] * constants["SPAN"]))
    shared = definitions.attention_decode_shared_bytes(constants)
    launch = kernel("attention_decode.cu", "attention_decode", shared, **constants)
    sums = states = tickets = None
    if splits > 1:
        sums = cupy.empty((rows, blocks, spans, constants["HEADS"] * head_dim), np.float32)
        states = cupy.empty((rows, blocks, spans, constants["HEADS"], 2), np.float32)
        tickets = _tickets(qkv.device.id, rows * blocks)
    arguments = (out, cache, sums, states, tickets, qkv, batch.last_key, batch.key_table)
    arguments += (np.int32(max_keys), np.int32(spans), scale(head_dim))
    launch((blocks, rows, splits), (32 * constants["WARPS"],), arguments, shared_mem=shared)
    return out


@functools.cache
def cut(rows: int, max_keys: int, *sizes: Any) -> tuple[int, int]:
    """Into how many blocks the keys of a row and head are split, and the warps of a block.

    Args:
        sizes: as `attention_decode_constants` takes them.
    """
    constants = definitions.attention_decode_constants(*sizes, 16)
    processors = multiprocessors(cupy.cuda.Device().id)
    span_keys = constants["CHUNK"] * constants["SPAN"]
    blocks = rows * constants["NUM_HEADS"] // constants["HEADS"]
    splits = min(-(-max_keys // span_keys), -(-_SPLIT_BLOCKS * processors // blocks))
    share = _FULL * processors // (blocks * splits)
    chunks = -(-min(max_keys, span_keys) // constants["CHUNK"])
    warps = next((n for n in (16, 8) if n <= share and n < 2 * chunks), 4)
    return splits, min(warps, constants["WARPS"])


@functools.cache
def _tickets(device: int, count: int) -> Array:
    """Zeros, as the kernel leaves them; kept, so that a graph of launches can be captured."""
    return cupy.zeros(count, np.int32)
