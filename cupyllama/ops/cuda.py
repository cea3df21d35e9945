"""The operations on a GPU: checks and one launch each; `reference` says what they mean."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import cupy
import cupyx
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops import cublaslt, gemm_sm90
from cupyllama.ops.arrays import check, storage
from cupyllama.ops.attention import (  # noqa: F401
    attention,
    attention_mma,
    attention_portable,
    attention_sm90,
    rope,
)
from cupyllama.ops.attention_plan import QUERY_TILE, attention_arrays, item_queries  # noqa: F401
from cupyllama.ops.gemm import gemm
from cupyllama.packing import MicroBatch
from cupyllama.quantized import VALUE_DTYPES, Quantized

# Of a tile of a matrix product, and few: the last micro-batch is hardly longer than its text.
TOKEN_MULTIPLE = 128
LOGIT_CHUNK = 2048

Array = cupy.ndarray

# Kinds of error and the status of each that says so; CuPy's own OutOfMemoryError is a MemoryError.
_OUT_OF_MEMORY = {"CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3}


@dataclass(frozen=True)
class DeviceBatch(MicroBatch):
    """A MicroBatch in device memory, cut for attention as `attention_plan` says.

    Keep it until its results are there: the pool would hand `staged` out again.
    """

    items: Array  # (items, 4)
    steps: Array  # (steps, 4)
    tiles: Array  # (tiles, 2)
    counter: Array  # (1,)
    item_queries: int
    staged: np.ndarray  # pinned, and copied from while the device gets to it


class Clock:
    """Marks in the work of the device, as seconds since the epoch."""

    def __init__(self) -> None:
        self._first = cupy.cuda.Event()
        self._first.record()
        self._first.synchronize()
        self._begin = time.time()

    def mark(self) -> cupy.cuda.Event:
        """This point in the work queued so far."""
        event = cupy.cuda.Event()
        event.record()
        return event

    def seconds(self, mark: cupy.cuda.Event) -> float:
        """When the device was at the mark, which it must have passed."""
        return self._begin + cupy.cuda.get_elapsed_time(self._first, mark) / 1e3

    def now(self) -> float:
        """The time at the host."""
        return time.time()


def to_device(array: np.ndarray) -> Array:
    """A copy in device memory."""
    return cupy.asarray(array)


def download(array: Array) -> Callable[[], np.ndarray]:
    """Start the way back to the host; calling the result waits for it and gives the array."""
    pinned = cupyx.empty_pinned(array.shape, array.dtype)
    array.get(out=pinned, blocking=False)
    copied = cupy.cuda.Event(disable_timing=True)
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return pinned

    return wait


def synchronize() -> None:
    """Wait for all that was queued."""
    cupy.cuda.get_current_stream().synchronize()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Makes a MemoryError of every way in which the device says that it has no memory left."""
    try:
        yield
    except Exception as error:
        if _OUT_OF_MEMORY.get(type(error).__name__) == getattr(error, "status", None) is not None:
            raise MemoryError(str(error)) from None
        raise


def release_memory() -> None:
    """Give unused memory back after an operation ran out of it."""
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def check_libraries() -> None:
    """Raises whatever keeps cuBLASLt from loading, or a kernel from being compiled and loaded."""
    cublaslt.version()
    kernel("swiglu.cu", "swiglu", **definitions.swiglu_constants("FP16", 64))


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Uninitialised device memory."""
    return cupy.empty(shape, dtype)


def upload(batch: MicroBatch) -> DeviceBatch:
    """The micro-batch in device memory by one copy, which the host does not wait for."""
    # These come first: the kernels read them by fours and in pairs, which must be aligned.
    queries = item_queries(batch)
    arrays = attention_arrays(batch, queries)
    arrays |= {field.name: getattr(batch, field.name) for field in fields(MicroBatch)}
    parts, pinned = upload_arrays(arrays)
    return DeviceBatch(**parts, item_queries=queries, staged=pinned)


def upload_arrays(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Array], np.ndarray]:
    """int32 arrays in device memory by one copy, and the pinned memory that it is from.

    They lie one behind the other, so those come first that must be aligned.
    """
    ends = np.cumsum([array.size for array in arrays.values()]).tolist()
    pinned = cupyx.empty_pinned(ends[-1], np.int32)
    np.concatenate([array.ravel() for array in arrays.values()], out=pinned)
    device = cupy.empty(ends[-1], np.int32)
    device.set(pinned)
    parts = {
        name: device[end - array.size : end].reshape(array.shape)
        for (name, array), end in zip(arrays.items(), ends, strict=True)
    }
    return parts, pinned


def gather(rows: Array, table: Array) -> Array:
    """Rows of a table: (n,) int32, (any, columns) -> (n, columns); of a negative number, row 0."""
    (count,), (_, columns) = rows.shape, table.shape
    check(rows, np.int32, (count,))
    check(table, table.dtype, table.shape)
    out = cupy.empty((count, columns), table.dtype)
    if out.size:
        constants = definitions.gather_constants(columns, table.itemsize)
        launch = kernel("gather.cu", "gather", **constants)
        launch((count,), (_threads(constants["UNITS"]),), (out, rows, table))
    return out


def quantize(x: Array, out: Quantized | None = None, kind: str = "fp8") -> Quantized:
    """Rows as numbers of 8 bits, each row with a scale: (rows, columns); see `reference.quantize`.

    Args:
        kind: fp8 or int8, where there is no `out` to show it.
    """
    rows, columns = x.shape
    check(x, x.dtype, (rows, columns))
    if out is None:
        out = _quantized(rows, columns, kind)
    check(out.values, VALUE_DTYPES[out.kind], (rows, columns))
    check(out.scale, np.float32, (rows,), one_by_one=True)
    if x.size:
        constants = definitions.quantize_constants(storage(x), columns, out.kind)
        launch = kernel("quantize.cu", "quantize", **constants)
        launch((rows,), (constants["THREADS"],), (out.values, out.scale, x))
    return out


def dequantize(matrix: Quantized, dtype: np.dtype) -> Array:
    """What int8 stands for, as `dtype`: (rows, columns); see `reference.dequantize`."""
    rows, columns = matrix.shape
    check(matrix.values, np.int8, (rows, columns))
    check(matrix.scale, np.float32, (rows,), one_by_one=True)
    out = cupy.empty((rows, columns), dtype)
    if out.size:
        constants = definitions.dequantize_constants(storage(out), columns)
        packs = out.size // definitions.pack_width(columns, out.itemsize)
        blocks = -(-packs // (constants["THREADS"] * constants["SLOTS"]))
        launch = kernel("dequantize.cu", "dequantize", **constants)
        arguments = (out, matrix.values, matrix.scale, np.uint32(packs))
        launch((blocks,), (constants["THREADS"],), arguments)
    return out


def _quantized(rows: int, columns: int, kind: str = "fp8") -> Quantized:
    values = cupy.empty((rows, columns), VALUE_DTYPES[kind])
    return Quantized(values, cupy.empty(rows, np.float32))


def _operands(
    x: Array | Quantized, weight: Array | Quantized
) -> tuple[Array | Quantized, Array | Quantized]:
    """Both as a product takes them: both quantized, or both arrays.

    Beside an int8 weight in the dtype of x, in memory that the pool has again after the product.
    """
    if not isinstance(weight, Quantized):
        return x, weight
    if weight.kind == "int8":
        return x, dequantize(weight, x.dtype)
    return x if isinstance(x, Quantized) else quantize(x), weight


def _results(rows: int, columns: int, dtype: np.dtype, quantized: bool) -> tuple[Any, tuple]:
    """What an operation returns, and the arrays that its kernel writes for it."""
    if quantized:
        out = _quantized(rows, columns)
        return out, (out.values, out.scale)
    out = cupy.empty((rows, columns), dtype)
    return out, (out,)


def rmsnorm(x: Array, weight: Array, eps: float, quantized: bool = False) -> Array | Quantized:
    """x / sqrt(mean(x²) + eps) · weight: (tokens, hidden) -> the same."""
    tokens, hidden = x.shape
    check(x, x.dtype, (tokens, hidden))
    check(weight, x.dtype, (hidden,))
    out, written = _results(tokens, hidden, x.dtype, quantized)
    if x.size:
        constants = definitions.rmsnorm_constants(storage(x), hidden, quantized)
        launch = kernel("rmsnorm.cu", "rmsnorm", **constants)
        launch((tokens,), (constants["THREADS"],), (*written, x, weight, np.float32(eps)))
    return out


def layernorm(
    x: Array, weight: Array, bias: Array, eps: float, quantized: bool = False
) -> Array | Quantized:
    """(x - mean(x)) / sqrt(var(x) + eps) · weight + bias: (tokens, hidden) -> the same."""
    tokens, hidden = x.shape
    check(x, x.dtype, (tokens, hidden))
    check(weight, x.dtype, (hidden,))
    check(bias, x.dtype, (hidden,))
    out, written = _results(tokens, hidden, x.dtype, quantized)
    if x.size:
        constants = definitions.layernorm_constants(storage(x), hidden, quantized)
        launch = kernel("layernorm.cu", "layernorm", **constants)
        launch((tokens,), (constants["THREADS"],), (*written, x, weight, bias, np.float32(eps)))
    return out


def add(x: Array, y: Array) -> Array:
    """x + y, in the memory of x: (tokens, hidden) each."""
    tokens, hidden = x.shape
    check(x, x.dtype, (tokens, hidden))
    check(y, x.dtype, (tokens, hidden))
    if x.size:
        launch = kernel("add.cu", "add", **definitions.add_constants(storage(x), hidden))
        packs = hidden // definitions.pack_width(hidden, x.itemsize)
        launch((tokens, _blocks(packs)), (256,), (x, y))
    return x


def linear(
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array | None = None,
    residual: Array | None = None,
    out_dtype: np.dtype | None = None,
) -> Array:
    """x · weightᵀ + bias + residual: (tokens, in), (out, in), (out,), (tokens, out) -> the last.

    The result takes the memory of `residual`, where there is one.
    """
    if out_dtype is None:
        out_dtype = x.dtype if residual is None else residual.dtype
    shape, dtype = (len(x), len(weight)), np.dtype(out_dtype)
    if residual is not None:
        check(residual, dtype, shape)
    out = cupy.empty(shape, dtype) if residual is None else residual
    if not out.size:
        return out
    x, weight = _operands(x, weight)
    gemm(out, x, weight, accumulate=residual is not None, bias=bias)
    return out


def linear_relu(
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array,
    quantized: bool = False,
    out_dtype: np.dtype | None = None,
) -> Array | Quantized:
    """max(x · weightᵀ + bias, 0): (tokens, in), (out, in), (out,) -> (tokens, out).

    With `quantized` it is written, and rounded for that, once more than in `reference`.
    """
    out = cupy.empty((len(x), len(weight)), np.dtype(out_dtype or x.dtype))
    if out.size:
        x, weight = _operands(x, weight)
        gemm(out, x, weight, bias=bias, relu=True)
    return quantize(out) if quantized else out


def linear_swiglu(
    x: Array | Quantized,
    weight: Array | Quantized,
    quantized: bool = False,
    out_dtype: np.dtype | None = None,
) -> Array | Quantized:
    """silu(x · gateᵀ) · (x · upᵀ): (tokens, in), (2 · n, in), gate first -> (tokens, n).

    By one kernel where the device has what it needs; elsewhere gate and up are written, and rounded
    for that, once more than in `reference`.
    """
    dtype = np.dtype(out_dtype or x.dtype)
    x, weight = _operands(x, weight)
    if not gemm_sm90.fits(x, weight, dtype):
        return swiglu(linear(x, weight, out_dtype=dtype), quantized)
    out = cupy.empty((len(x), len(weight) // 2), dtype)
    gemm_sm90.linear_swiglu(out, x, weight)
    return quantize(out) if quantized else out


def linear_rope(
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array | None,
    positions: Array,
    cos: Array,
    sin: Array,
    num_heads: int,
    num_key_value_heads: int,
    out_dtype: np.dtype | None = None,
) -> Array:
    """x · weightᵀ + bias with its queries and keys rotated by their positions; see `reference`.

    By one kernel where the device has what it needs and there is no bias; elsewhere the rotation is
    of numbers that were rounded, once more than in `reference`.
    """
    dtype, head_dim = np.dtype(out_dtype or x.dtype), 2 * cos.shape[1]
    x, weight = _operands(x, weight)
    if bias is not None or not gemm_sm90.fits(x, weight, dtype, head_dim):
        qkv = linear(x, weight, bias, out_dtype=dtype)
        return rope(qkv, positions, cos, sin, num_heads, num_key_value_heads)
    out = cupy.empty((len(x), len(weight)), dtype)
    rotated = (num_heads + num_key_value_heads) * head_dim
    gemm_sm90.linear_rope(out, x, weight, positions, cos, sin, rotated)
    return out


def swiglu(gate_up: Array, quantized: bool = False) -> Array | Quantized:
    """silu(gate) · up: (tokens, 2 · intermediate), gate first -> (tokens, intermediate)."""
    tokens, intermediate = len(gate_up), gate_up.shape[1] // 2
    check(gate_up, gate_up.dtype, (tokens, 2 * intermediate))
    out, written = _results(tokens, intermediate, gate_up.dtype, quantized)
    if gate_up.size:
        constants = definitions.swiglu_constants(storage(gate_up), intermediate, quantized)
        launch = kernel("swiglu.cu", "swiglu", **constants)
        packs = intermediate // definitions.pack_width(intermediate, gate_up.itemsize)
        grid, threads = (
            ((tokens,), constants["THREADS"]) if quantized else ((tokens, _blocks(packs)), 256)
        )
        launch(grid, (threads,), (*written, gate_up))
    return out


def log_probs(logits: Array, target_start: Array, target_token: Array, out: Array) -> None:
    """Write log softmax(logits) at the targets, and whether each target is the most likely token.

    Args:
        logits: (rows, vocab) float32.
        target_start: (rows + 1,) int32; row r has the targets target_start[r]:target_start[r + 1].
        target_token: (targets,) int32.
        out: (2, targets) float32; only columns target_start[0]:target_start[-1] are written.
    """
    (rows, vocab), (targets,) = logits.shape, target_token.shape
    check(logits, np.float32, (rows, vocab))
    check(target_start, np.int32, (rows + 1,))
    check(target_token, np.int32, (targets,))
    check(out, np.float32, (2, targets))
    if rows and targets:
        constants = definitions.log_probs_constants(vocab)
        launch = kernel("log_probs.cu", "log_probs", **constants)
        arguments = (out, logits, target_start, target_token, np.int32(targets))
        launch((rows,), (constants["THREADS"],), arguments)


def log_probs_part(
    logits: Array, target_start: Array, target_token: Array, first_token: int, out: Array
) -> None:
    """What one of several parts of the vocabulary says of the targets; see `reference`.

    Args:
        logits: (rows, tokens) float32, of `first_token` and those that follow it.
        target_start, target_token: as `log_probs` takes them.
        out: (4, targets) float32; only columns target_start[0]:target_start[-1] are written.
    """
    (rows, vocab), (targets,) = logits.shape, target_token.shape
    check(logits, np.float32, (rows, vocab))
    check(target_start, np.int32, (rows + 1,))
    check(target_token, np.int32, (targets,))
    check(out, np.float32, (4, targets))
    if rows and targets:
        constants = definitions.log_probs_constants(vocab)
        launch = kernel("log_probs.cu", "log_probs_part", **constants)
        numbers = (np.int32(targets), np.int32(first_token))
        arguments = (out, logits, target_start, target_token, *numbers)
        launch((rows,), (constants["THREADS"],), arguments)


def logits(own: Array) -> Array:
    """Of all the vocabulary: (rows, vocab) float32, which a lone rank has."""
    return own


def join_log_probs(parts: Array, target_start: Array, target_token: Array, out: Array) -> None:
    """`log_probs` of all the vocabulary, from what `log_probs_part` found in its parts.

    Args:
        parts: (parts, 4, targets) float32, in the vocabulary's order.
        target_start, target_token, out: as `log_probs` takes them.
    """
    count, _, targets = parts.shape
    rows = len(target_start) - 1
    check(parts, np.float32, (count, 4, targets))
    check(target_start, np.int32, (rows + 1,))
    check(target_token, np.int32, (targets,))
    check(out, np.float32, (2, targets))
    if rows and targets:
        # VOCAB is nothing to it: one that is often compiled anyway.
        launch = kernel("log_probs.cu", "join_log_probs", **definitions.log_probs_constants(32000))
        sizes = (np.int32(count), np.int32(rows), np.int32(targets))
        launch((_blocks(rows),), (256,), (out, parts, target_start, target_token, *sizes))


def sum_parts(own: Array, received: Array, rank: int) -> None:
    """Add to `own` (count,) the rows of `received` (ranks, count), itself in the place of its own.

    In the order of ranks, and rounded once; see `reference.sum_parts`.
    """
    ranks, count = received.shape
    check(own, own.dtype, (count,))
    check(received, own.dtype, (ranks, count))
    if count:
        constants = definitions.sum_parts_constants(storage(own), count, ranks)
        packs = count // constants["WIDTH"]
        launch = kernel("sum_parts.cu", "sum_parts", **constants)
        launch((_blocks(packs),), (256,), (own, received, np.int64(packs), np.int32(rank)))


def _threads(items: int) -> int:
    return min(-(-items // 32) * 32, 256)


def _blocks(items: int) -> int:
    return -(-items // 256)
