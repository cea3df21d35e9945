"""The operations in NumPy: their definition, and what runs on a machine without a GPU.

Storage may be float32, float16 or bfloat16; every product, sum, norm and softmax is float32, and a
result is rounded once, to the dtype it is stored in.

Work is cut into pieces of a fixed size for the cores at hand, each piece on one core, so that a
result has the same bits on any number of them: BLAS's own threads would round by their count.
"""

import contextvars
import functools
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import ml_dtypes
import numpy as np

from cupyllama.packing import MicroBatch
from cupyllama.quantized import LARGEST, VALUE_DTYPES, Quantized

# Any number of tokens will do: padding would only cost time.
TOKEN_MULTIPLE = 1
LOGIT_CHUNK = 2048

# Rows of a matrix product that one core computes at a time.
ROW_BLOCK = 128

_TINY = np.finfo(np.float32).tiny  # below it, 1 / scale would not be finite


class Clock:
    """Marks in the work of the device, as seconds since the epoch."""

    def mark(self) -> float:
        """This point in the work queued so far."""
        return time.time()

    def seconds(self, mark: float) -> float:
        """When the device was at the mark, which it must have passed."""
        return mark

    def now(self) -> float:
        """The time at the host."""
        return time.time()


def to_device(array: np.ndarray) -> np.ndarray:
    """Where the operations want their arrays: here, where they are."""
    return array


def download(array: np.ndarray) -> Callable[[], np.ndarray]:
    """Start the way back to the host; calling the result waits for it and gives the array."""
    return lambda: array


def upload(batch: MicroBatch) -> MicroBatch:
    """The micro-batch where the operations want it."""
    return batch


def synchronize() -> None:
    """Wait for all that was queued."""


def memory_errors() -> AbstractContextManager:
    """Makes a MemoryError of every way in which the device says that it has no memory left."""
    return nullcontext()


def release_memory() -> None:
    """Give unused memory back after an operation ran out of it."""


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory."""
    return np.empty(shape, dtype)


def gather(rows: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Rows of a table: (n,) int32, (any, columns) -> (n, columns); of a negative number, row 0."""
    return table[np.maximum(rows, 0)]


def quantize(x: np.ndarray, out: Quantized | None = None, kind: str = "fp8") -> Quantized:
    """Rows as numbers of 8 bits, each row scaled so that its largest number is the kind's.

    scale = max |row| / 448 for fp8 or / 127 for int8, or 1 where that is too small to be divided
    by; a value is rounded to the nearest e4m3 (Micikevicius et al. 2022) or integer, ties to even.
    In fp8 NaN stays NaN, and infinity makes all of its row NaN. int8 has neither: one of them makes
    all of its row NaN, as zeros with a scale of infinity.

    Args:
        x: (rows, columns).
        out: filled and returned, where it is given.
        kind: fp8 or int8, where there is no `out` to show it.
    """
    if out is None:
        out = Quantized(np.empty(x.shape, VALUE_DTYPES[kind]), np.empty(len(x), np.float32))
    x32, largest = _float32(x), np.float32(LARGEST[out.kind])
    # Of a row with NaN np.maximum is NaN; np.fmax leaves it out.
    maximum = np.fmax if out.kind == "fp8" else np.maximum
    scale = maximum.reduce(np.abs(x32), axis=1, initial=0) / largest
    scale[scale < _TINY] = 1
    scale[np.isnan(scale)] = np.inf
    with np.errstate(invalid="ignore"):  # infinity times 0; NaN
        scaled = x32 * (1 / scale)[:, None]
        if out.kind == "fp8":
            scaled = np.clip(scaled, -largest, largest).astype(ml_dtypes.float8_e4m3fn)
            out.values[...] = scaled.view(np.uint8)
        else:
            scaled[np.isinf(scale)] = 0
            out.values[...] = np.rint(scaled, out=scaled)  # nothing is beyond 127 by half a step
    out.scale[...] = scale
    return out


def dequantize(matrix: Quantized, dtype: np.dtype = np.float32) -> np.ndarray:
    """The numbers that it stands for, as float32 and then as `dtype`: (rows, columns)."""
    values = _unscaled(matrix.values) if matrix.kind == "fp8" else _float32(matrix.values)
    with np.errstate(invalid="ignore", over="ignore"):  # what was infinite is 0 times infinity
        return (values * matrix.scale[:, None]).astype(dtype, copy=False)


def rmsnorm(
    x: np.ndarray, weight: np.ndarray, eps: float, quantized: bool = False
) -> np.ndarray | Quantized:
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019): (tokens, hidden) -> the same.

    With `quantized`, as `quantize` makes it, and not rounded before.
    """
    x32 = _float32(x)
    scale = 1 / np.sqrt(np.mean(x32 * x32, axis=-1, keepdims=True) + np.float32(eps))
    return _stored(x32 * scale * _float32(weight), x.dtype, quantized)


def layernorm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, quantized: bool = False
) -> np.ndarray | Quantized:
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias (Ba et al. 2016): (tokens, hidden).

    With `quantized`, as `quantize` makes it, and not rounded before.
    """
    x32 = _float32(x)
    centred = x32 - np.mean(x32, axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))
    return _stored(centred * scale * _float32(weight) + _float32(bias), x.dtype, quantized)


def linear(
    x: np.ndarray | Quantized,
    weight: np.ndarray | Quantized,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    out_dtype: np.dtype | None = None,
) -> np.ndarray:
    """x · weightᵀ + bias + residual: (tokens, in), (out, in), (out,), (tokens, out).

    A weight of fp8 is multiplied with a quantized x: `quantize` makes one of an array. A weight of
    int8 is multiplied with an array, as what `dequantize` makes of it in the dtype of x.
    The caller gives `residual` up: an implementation may return the result in its memory.

    Args:
        out_dtype: needed where neither a residual nor an x that is an array shows it.
    """
    if residual is not None:
        out_dtype = out_dtype or residual.dtype
    if isinstance(weight, Quantized) and weight.kind == "int8":
        weight = dequantize(weight, x.dtype)
    if isinstance(weight, Quantized):
        if not isinstance(x, Quantized):
            out_dtype, x = out_dtype or x.dtype, quantize(x)
        transposed, rows = dequantize(weight).T, _unscaled(x.values) * x.scale[:, None]
    else:
        transposed, rows, out_dtype = _float32(weight).T, x, out_dtype or x.dtype
    assert out_dtype is not None
    y = np.empty((len(x), len(weight)), out_dtype)

    def multiply(first: int) -> None:
        block = slice(first, first + ROW_BLOCK)
        product = _float32(rows[block]) @ transposed
        if bias is not None:
            product += _float32(bias)
        if residual is not None:
            product += _float32(residual[block])
        y[block] = product

    _on_all_cores(multiply, range(0, len(x), ROW_BLOCK))
    return y


def linear_swiglu(
    x: np.ndarray | Quantized,
    weight: np.ndarray | Quantized,
    quantized: bool = False,
    out_dtype: np.dtype | None = None,
) -> np.ndarray | Quantized:
    """silu(x · gateᵀ) · (x · upᵀ) (Shazeer 2020): (tokens, in), (2 · n, in) -> (tokens, n).

    Args:
        weight: gate, then up.
        quantized: give the result as `quantize` makes it.
        out_dtype: needed where x is quantized.
    """
    dtype = out_dtype or x.dtype
    gate, up = np.split(linear(x, weight, out_dtype=np.float32), 2, axis=1)
    return _stored(_silu(gate) * up, dtype, quantized)


def linear_relu(
    x: np.ndarray | Quantized,
    weight: np.ndarray | Quantized,
    bias: np.ndarray,
    quantized: bool = False,
    out_dtype: np.dtype | None = None,
) -> np.ndarray | Quantized:
    """max(x · weightᵀ + bias, 0), NaN where the sum is: (tokens, in), (out, in) -> (tokens, out).

    Args:
        quantized: give the result as `quantize` makes it.
        out_dtype: needed where x is quantized.
    """
    dtype = out_dtype or x.dtype
    return _stored(np.maximum(linear(x, weight, bias, out_dtype=np.float32), 0), dtype, quantized)


def linear_rope(
    x: np.ndarray | Quantized,
    weight: np.ndarray | Quantized,
    bias: np.ndarray | None,
    positions: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    num_heads: int,
    num_key_value_heads: int,
    out_dtype: np.dtype | None = None,
) -> np.ndarray:
    """x · weightᵀ + bias with its queries and keys rotated by their positions; see `rope`.

    Args:
        x: (tokens, in).
        weight: ((num_heads + 2 · num_key_value_heads) · head_dim, in), q then k then v.
        out_dtype: needed where x is quantized.
    """
    dtype = out_dtype or x.dtype
    qkv = linear(x, weight, bias, out_dtype=np.float32)
    return rope(qkv, positions, cos, sin, num_heads, num_key_value_heads).astype(dtype)


def rope(
    qkv: np.ndarray,
    positions: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    num_heads: int,
    num_key_value_heads: int,
) -> np.ndarray:
    """Rotate the queries and keys of qkv by their positions, in place (Su et al. 2021).

    HF's rotate-half pairing: element i turns with element i + head_dim / 2.

    Args:
        qkv: (tokens, (num_heads + 2 · num_key_value_heads) · head_dim), q then k then v.
        positions: (tokens,) int32.
        cos, sin: (positions, head_dim / 2) float32.
    """
    tokens = len(qkv)
    half = cos.shape[1]
    rotated = num_heads + num_key_value_heads
    heads = qkv.reshape(tokens, -1, 2 * half)[:, :rotated]
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b = _float32(heads[..., :half]), _float32(heads[..., half:])
    heads[..., :half], heads[..., half:] = a * c - b * s, b * c + a * s
    return qkv


def attention(
    qkv: np.ndarray,
    batch: MicroBatch,
    num_heads: int,
    num_key_value_heads: int,
    cache: np.ndarray | None = None,
) -> np.ndarray:
    """softmax(q · kᵀ / sqrt(head_dim)) · v over the packed segments of `batch`, causal.

    Args:
        qkv: (tokens, (num_heads + 2 · num_key_value_heads) · head_dim), q and k rotated.
        cache: (slots, 2 · num_key_value_heads · head_dim), k then v. Given, those of the tokens are
            put into `batch.slots` of it first, and `batch.key_index` points into it.

    Returns:
        (tokens, num_heads · head_dim).
    """
    tokens = len(qkv)
    head_dim = qkv.shape[1] // (num_heads + 2 * num_key_value_heads)
    group = num_heads // num_key_value_heads
    heads = qkv.reshape(tokens, -1, head_dim)
    out = np.empty((tokens, num_heads, head_dim), qkv.dtype)
    known = heads[:, num_heads:]  # keys and values, by the numbers that key_index has
    if cache is not None:
        cache[batch.slots] = qkv[:, num_heads * head_dim :]
        known = cache.reshape(len(cache), -1, head_dim)

    def attend(segment: int) -> None:
        first, last = batch.segment_start[segment : segment + 2]
        keys = batch.key_index[batch.key_start[segment] : batch.key_start[segment + 1]]
        n, k = last - first, len(keys)
        q = _float32(heads[first:last, :num_heads]).transpose(1, 0, 2)
        q = q.reshape(num_key_value_heads, group * n, head_dim)
        kv = _float32(known[keys]).transpose(1, 2, 0)  # (2 · kv heads, head_dim, k)
        scores = (q @ kv[:num_key_value_heads]) * np.float32(head_dim**-0.5)
        scores = scores.reshape(num_heads, n, k)
        unseen = np.arange(k) > np.arange(k - n, k)[:, None]
        scores[:, unseen] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        values = kv[num_key_value_heads:].transpose(0, 2, 1)
        mixed = scores.reshape(num_key_value_heads, group * n, k) @ values
        out[first:last] = mixed.reshape(num_heads, n, head_dim).transpose(1, 0, 2)

    _on_all_cores(attend, range(len(batch.segment_start) - 1))
    return out.reshape(tokens, num_heads * head_dim)


def swiglu(gate_up: np.ndarray, quantized: bool = False) -> np.ndarray | Quantized:
    """silu(gate) · up (Shazeer 2020), gate first: (tokens, 2 · n) -> (tokens, n).

    With `quantized`, as `quantize` makes it, and not rounded before.
    """
    gate, up = np.split(_float32(gate_up), 2, axis=1)
    return _stored(_silu(gate) * up, gate_up.dtype, quantized)


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y: (tokens, hidden) each. The caller gives x up."""
    return (_float32(x) + _float32(y)).astype(x.dtype)


def log_probs(
    logits: np.ndarray, target_start: np.ndarray, target_token: np.ndarray, out: np.ndarray
) -> None:
    """Write log softmax(logits) at the targets, and whether each target is the most likely token.

    Args:
        logits: (rows, vocab) float32.
        target_start: (rows + 1,) int32; row r has the targets target_start[r]:target_start[r + 1].
        target_token: (targets,) int32.
        out: (2, targets) float32; the log-probability, and 1 or 0. The lowest token wins a tie.
            Only columns target_start[0]:target_start[-1] are written.
    """
    target_row = np.repeat(np.arange(len(logits)), np.diff(target_start))
    wanted = slice(target_start[0], target_start[-1])
    peak = logits.max(axis=1)
    log_sum = np.log(np.exp(logits - peak[:, None]).sum(axis=1)) + peak
    out[0, wanted] = logits[target_row, target_token[wanted]] - log_sum[target_row]
    out[1, wanted] = logits.argmax(axis=1)[target_row] == target_token[wanted]


def log_probs_part(
    logits: np.ndarray,
    target_start: np.ndarray,
    target_token: np.ndarray,
    first_token: int,
    out: np.ndarray,
) -> None:
    """What one of several parts of the vocabulary says of the targets, for `join_log_probs`.

    Args:
        logits: (rows, tokens) float32, of `first_token` and those that follow it.
        target_start, target_token: as `log_probs` takes them.
        out: (4, targets) float32: the row's largest logit, the sum of exp(logit - largest), and the
            lowest token that has the largest; the target's logit, or 0 if it is of another part.
            Only columns target_start[0]:target_start[-1] are written.
    """
    target_row = np.repeat(np.arange(len(logits)), np.diff(target_start))
    wanted = slice(target_start[0], target_start[-1])
    peak = logits.max(axis=1)
    with np.errstate(invalid="ignore"):  # infinity less infinity, where it is all that there is
        total = np.exp(logits - peak[:, None]).sum(axis=1)
    total[peak == -np.inf] = 0
    column = target_token[wanted] - first_token
    has = (column >= 0) & (column < logits.shape[1])
    out[0, wanted], out[1, wanted] = peak[target_row], total[target_row]
    out[2, wanted] = (logits.argmax(axis=1) + first_token)[target_row]
    out[3, wanted] = np.where(has, logits[target_row, np.where(has, column, 0)], 0)


def logits(own: np.ndarray) -> np.ndarray:
    """Of all the vocabulary: (rows, vocab) float32, which a lone rank has."""
    return own


def join_log_probs(
    parts: np.ndarray, target_start: np.ndarray, target_token: np.ndarray, out: np.ndarray
) -> None:
    """`log_probs` of all the vocabulary, from what was found in its parts.

    Args:
        parts: (parts, 4, targets) float32, as `log_probs_part` wrote them, in the vocabulary's
            order.
        target_start, target_token, out: as `log_probs` takes them.
    """
    wanted = slice(target_start[0], target_start[-1])
    peaks, sums, tokens, logits = parts[..., wanted].transpose(1, 0, 2)
    peak = peaks.max(axis=0)
    log_sum = np.log((sums * np.exp(peaks - peak)).sum(axis=0)) + peak
    best = np.take_along_axis(tokens, peaks.argmax(axis=0)[None], axis=0)[0]
    out[0, wanted] = logits.sum(axis=0) - log_sum
    out[1, wanted] = best == target_token[wanted]


def sum_parts(own: np.ndarray, received: np.ndarray, rank: int) -> None:
    """Add to `own` the numbers that belong to it, in the order of ranks, rounded once, at the end.

    Args:
        own: (count,), the part of `rank`.
        received: (ranks, count), those of the others; row `rank` may hold anything.
    """
    total = np.zeros(len(own), np.float32)
    for number, part in enumerate(received):
        total += _float32(own if number == rank else part)
    own[...] = total


def _silu(x32: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) overflows to inf where silu(x) is 0
        return x32 / (1 + np.exp(-x32))


def _stored(x32: np.ndarray, dtype: np.dtype, quantized: bool) -> np.ndarray | Quantized:
    return quantize(x32) if quantized else x32.astype(dtype)


def _unscaled(values: np.ndarray) -> np.ndarray:
    return values.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _float32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32, copy=False)


def _on_all_cores(work: Callable[[int], None], pieces: Iterable[int]) -> None:
    """Call `work` with every piece; NumPy lets other threads run while it computes."""
    context = contextvars.copy_context()  # holds np.errstate
    for _ in _pool().map(lambda piece: context.copy().run(work, piece), pieces):
        pass


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """A thread for every core that this process may use, and BLAS kept to one a call."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores, thread_name_prefix="reference")
