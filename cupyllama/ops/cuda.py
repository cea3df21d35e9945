"""The operations on a GPU: checks and one launch each; `reference` says what they mean."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import cupy
import cupyx
import numpy as np

from cupyllama import kernels
from cupyllama.kernels import kernel
from cupyllama.ops.gemm import gemm
from cupyllama.packing import MicroBatch
from cupyllama.quantized import Quantized

# One shape for every matrix product of a run: cuBLAS may choose another algorithm for another one.
FIXED_SHAPES = True
LOGIT_CHUNK = 1024

# Queries of a block of either attention kernel.
QUERY_TILE = 64

Array = cupy.ndarray

# Kinds of error and the status of each that says so; CuPy's own OutOfMemoryError is a MemoryError.
_OUT_OF_MEMORY = {"CUDARuntimeError": 2, "CUDADriverError": 2, "CUBLASError": 3}

_STORAGE = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


@dataclass(frozen=True)
class DeviceBatch(MicroBatch):
    """A MicroBatch in device memory, cut into tiles for attention.

    Keep it until its results are there: the pool would hand `staged` out again.
    """

    tiles: Array  # (tiles, 2) segment, first query in it; most keys first
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
    """Raises whatever keeps cuBLAS from loading, or a kernel from being compiled and loaded."""
    from cupy_backends.cuda.libs import cublas  # noqa: F401

    kernel("swiglu.cu", "swiglu", **kernels.swiglu_constants("FP16", 64))


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Uninitialised device memory."""
    return cupy.empty(shape, dtype)


def upload(batch: MicroBatch) -> DeviceBatch:
    """The micro-batch in device memory by one copy, which the host does not wait for."""
    # The tiles come first: the kernels read them in pairs, which must be aligned.
    arrays = {"tiles": attention_tiles(batch)}
    arrays |= {field.name: getattr(batch, field.name) for field in fields(MicroBatch)}
    ends = np.cumsum([array.size for array in arrays.values()]).tolist()
    pinned = cupyx.empty_pinned(ends[-1], np.int32)
    np.concatenate([array.ravel() for array in arrays.values()], out=pinned)
    device = cupy.empty(ends[-1], np.int32)
    device.set(pinned)
    parts = {
        name: device[end - array.size : end].reshape(array.shape)
        for (name, array), end in zip(arrays.items(), ends, strict=True)
    }
    return DeviceBatch(**parts, staged=pinned)


def attention_tiles(batch: MicroBatch) -> np.ndarray:
    """Segments cut into QUERY_TILE queries: (tiles, 2) int32, those that see most keys first."""
    queries, keys = np.diff(batch.segment_start), np.diff(batch.key_start)
    count = -(-queries // QUERY_TILE)
    segment = np.repeat(np.arange(len(queries)), count)
    first = (np.arange(len(segment)) - np.repeat(np.cumsum(count) - count, count)) * QUERY_TILE
    seen = (keys - queries)[segment] + np.minimum(first + QUERY_TILE, queries[segment])
    order = np.argsort(-seen, kind="stable")
    return np.stack([segment, first], axis=1)[order].astype(np.int32)


def gather(rows: Array, table: Array) -> Array:
    """Rows of a table: (n,) int32, (any, columns) -> (n, columns)."""
    (count,), (_, columns) = rows.shape, table.shape
    _check(rows, np.int32, (count,))
    _check(table, table.dtype, table.shape)
    out = cupy.empty((count, columns), table.dtype)
    if out.size:
        constants = kernels.gather_constants(columns, table.itemsize)
        launch = kernel("gather.cu", "gather", **constants)
        launch((count,), (_threads(constants["UNITS"]),), (out, rows, table))
    return out


def quantize(x: Array, out: Quantized | None = None) -> Quantized:
    """Rows as e4m3, each with a scale: (rows, columns); see `reference.quantize`."""
    rows, columns = x.shape
    _check(x, x.dtype, (rows, columns))
    if out is None:
        out = _quantized(rows, columns)
    _check(out.values, np.uint8, (rows, columns))
    _check(out.scale, np.float32, (rows,))
    if x.size:
        constants = kernels.quantize_constants(_storage(x), columns)
        launch = kernel("quantize.cu", "quantize", **constants)
        launch((rows,), (constants["THREADS"],), (out.values, out.scale, x))
    return out


def _quantized(rows: int, columns: int) -> Quantized:
    return Quantized(cupy.empty((rows, columns), np.uint8), cupy.empty(rows, np.float32))


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
    _check(x, x.dtype, (tokens, hidden))
    _check(weight, x.dtype, (hidden,))
    out, written = _results(tokens, hidden, x.dtype, quantized)
    if x.size:
        constants = kernels.rmsnorm_constants(_storage(x), hidden, quantized)
        launch = kernel("rmsnorm.cu", "rmsnorm", **constants)
        launch((tokens,), (constants["THREADS"],), (*written, x, weight, np.float32(eps)))
    return out


def linear(
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array | None = None,
    residual: Array | None = None,
    out_dtype: np.dtype | None = None,
) -> Array:
    """x · weightᵀ + bias + residual: (tokens, in), (out, in), (out,), (tokens, out) -> the last.

    The result takes the memory of `residual`, where there is one.  With `bias` too their sum is
    rounded to the stored type before the product is added: one rounding more than `reference`.
    """
    if out_dtype is None:
        out_dtype = x.dtype if residual is None else residual.dtype
    shape, dtype = (len(x), len(weight)), np.dtype(out_dtype)
    if residual is not None:
        _check(residual, dtype, shape)
    out = cupy.empty(shape, dtype) if residual is None else residual
    if not out.size:
        return out
    if isinstance(weight, Quantized) and not isinstance(x, Quantized):
        x = quantize(x)
    if bias is not None:
        _put_bias(out, bias, add=residual is not None)
    gemm(out, x, weight, accumulate=bias is not None or residual is not None)
    return out


def _put_bias(rows: Array, bias: Array, add: bool) -> None:
    """rows += bias, or rows = bias: (tokens, out), (out,)."""
    tokens, wide = rows.shape
    _check(bias, bias.dtype, (wide,))
    out_type = "storage_t" if rows.dtype == bias.dtype else "float"
    assert out_type == "storage_t" or rows.dtype == np.float32, f"{rows.dtype} {bias.dtype}"
    width = kernels.pack_width(wide, rows.itemsize)
    name = "add_bias" if add else "set_bias"
    launch = kernel("bias.cu", name, STORAGE=_storage(bias), OUT_T=out_type, WIDE=wide)
    launch((tokens, _blocks(wide // width)), (256,), (rows, bias))


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
    constants = kernels.rope_constants(_storage(qkv), 2 * half, num_heads, num_key_value_heads)
    _check(qkv, qkv.dtype, (tokens, constants["ROW"]))
    _check(positions, np.int32, (tokens,))
    _check(cos, np.float32, (len(cos), half))
    _check(sin, np.float32, cos.shape)
    if tokens:
        packs = constants["ROTATED_HEADS"] * half // kernels.pack_width(half, qkv.itemsize)
        launch = kernel("rope.cu", "rope", **constants)
        launch((tokens,), (_threads(packs),), (qkv, positions, cos, sin))
    return qkv


def attention(
    qkv: Array,
    batch: DeviceBatch,
    cos: Array | None,
    sin: Array | None,
    num_heads: int,
    num_key_value_heads: int,
) -> Array:
    """softmax(q · kᵀ / sqrt(head_dim)) · v over the packed segments of `batch`, causal.

    Args:
        qkv: (tokens, (num_heads + 2 · num_key_value_heads) · head_dim), q then k then v; rotated
            in place.
        cos, sin: (positions, head_dim / 2) float32; None: no rotation.

    Returns:
        (tokens, num_heads · head_dim).
    """
    if cos is not None:
        rope(qkv, batch.positions, cos, sin, num_heads, num_key_value_heads)
    matrix_units = int(cupy.cuda.Device().compute_capability) >= 80 and qkv.itemsize == 2
    on = attention_mma if matrix_units else attention_portable
    return on(qkv, batch, num_heads, num_key_value_heads)


def attention_mma(
    qkv: Array, batch: DeviceBatch, num_heads: int, num_key_value_heads: int
) -> Array:
    """`attention` on matrix units: float16 or bfloat16, compute capability 8.0 and above."""
    out, heads = _attention_out(qkv, num_heads, num_key_value_heads)
    if out.size:
        constants = kernels.attention_mma_constants(*heads)
        shared = kernels.attention_mma_shared_bytes(constants)
        launch = kernel("attention_mma.cu", "attention_mma", shared, **constants)
        arguments = _attention_arguments(out, qkv, batch, constants["HEAD_DIM"])
        launch((num_heads * len(batch.tiles),), (128,), arguments, shared_mem=shared)
    return out


def attention_portable(
    qkv: Array, batch: DeviceBatch, num_heads: int, num_key_value_heads: int
) -> Array:
    """`attention` on any GPU, in any storage."""
    out, heads = _attention_out(qkv, num_heads, num_key_value_heads)
    if out.size:
        constants = kernels.attention_constants(*heads)
        launch = kernel("attention.cu", "attention", **constants)
        block_queries = 4 * constants["WARP_QUERIES"]
        grid = (num_heads * len(batch.tiles), QUERY_TILE // block_queries)
        launch(grid, (128,), _attention_arguments(out, qkv, batch, constants["HEAD_DIM"]))
    return out


def _attention_out(
    qkv: Array, num_heads: int, num_key_value_heads: int
) -> tuple[Array, tuple[str, int, int, int]]:
    tokens, width = qkv.shape
    head_dim, rest = divmod(width, num_heads + 2 * num_key_value_heads)
    _check(qkv, qkv.dtype, (tokens, width))
    assert rest == 0 and num_heads % num_key_value_heads == 0, f"{width=} {num_heads=}"
    assert head_dim % 2 == 0 and head_dim <= 256, f"{head_dim=}"
    out = cupy.empty((tokens, num_heads * head_dim), qkv.dtype)
    return out, (_storage(qkv), head_dim, num_heads, num_key_value_heads)


def _attention_arguments(
    out: Array, qkv: Array, batch: DeviceBatch, head_dim: int
) -> tuple[Any, ...]:
    assert len(batch.token_ids) == len(qkv), f"{len(batch.token_ids)} {len(qkv)}"
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))
    segments = (batch.tiles, batch.segment_start, batch.key_start, batch.key_index)
    return (out, qkv, *segments, scale)


def swiglu(gate_up: Array, quantized: bool = False) -> Array | Quantized:
    """silu(gate) · up: (tokens, 2 · intermediate), gate first -> (tokens, intermediate)."""
    tokens, intermediate = len(gate_up), gate_up.shape[1] // 2
    _check(gate_up, gate_up.dtype, (tokens, 2 * intermediate))
    out, written = _results(tokens, intermediate, gate_up.dtype, quantized)
    if gate_up.size:
        constants = kernels.swiglu_constants(_storage(gate_up), intermediate, quantized)
        launch = kernel("swiglu.cu", "swiglu", **constants)
        packs = intermediate // kernels.pack_width(intermediate, gate_up.itemsize)
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
    _check(logits, np.float32, (rows, vocab))
    _check(target_start, np.int32, (rows + 1,))
    _check(target_token, np.int32, (targets,))
    _check(out, np.float32, (2, targets))
    if rows and targets:
        constants = kernels.log_probs_constants(vocab)
        launch = kernel("log_probs.cu", "log_probs", **constants)
        arguments = (out, logits, target_start, target_token, np.int32(targets))
        launch((rows,), (constants["THREADS"],), arguments)


def _check(array: Array, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Kernels see a bare pointer: what lies behind it is checked here."""
    assert array.dtype == dtype, f"{array.dtype} instead of {dtype}"
    assert array.shape == shape, f"{array.shape} instead of {shape}"
    assert array.flags.c_contiguous, f"{array.shape} has strides {array.strides}"
    # Index arrays are read one by one; whatever holds numbers is read 16 bytes at a time.
    assert dtype == np.int32 or array.data.ptr % 16 == 0, f"{array.data.ptr:#x} is not aligned"


def _storage(array: Array) -> str:
    return _STORAGE[array.dtype.name]


def _threads(items: int) -> int:
    return min(-(-items // 32) * 32, 256)


def _blocks(items: int) -> int:
    return -(-items // 256)
