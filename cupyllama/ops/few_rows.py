"""Matrix products for any number of rows, and fast for few, where reading the weights is the work.

They mean what those of the same name in `cuda` mean, but a row's bits depend on how many rows there
are with it. All may be captured in a graph, once the same call ran outside one.
"""

from functools import cache
from typing import Any

import cupy
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops import cuda, few_rows_sm90
from cupyllama.ops.arrays import check, multiprocessors, storage
from cupyllama.ops.early import launch_early
from cupyllama.ops.gemm import gemm
from cupyllama.quantized import Quantized

Array = cupy.ndarray

# Up to so many rows gemv.cu is the fastest.  Beyond, few_rows_sm90.cu is for int8 on 9.0 and
# few_rows.cu elsewhere, as far as they go; then cuBLASLt, even after a pass that makes 16 bits of
# int8.
GEMV_ROWS = max(definitions.GEMV)
# From so many rows on everything is as in scoring, which has the best algorithms for that.
MANY_ROWS = 2048
# Whether weights are fetched while the kernel in front is still at work.
EARLY = True

_DTYPES = ("float16", "bfloat16")
_NO_TURN = (None, None, None, np.int32(0))


def linear(
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array | None = None,
    residual: Array | None = None,
    out_dtype: np.dtype | None = None,
) -> Array:
    """x · weightᵀ + bias + residual: (rows, in), (out, in), (out,), (rows, out) -> the last.

    The result takes the memory of `residual`, where there is one.
    """
    if len(x) >= MANY_ROWS:
        return cuda.linear(x, weight, bias, residual, out_dtype)
    dtype = np.dtype(out_dtype or (x if residual is None else residual).dtype)
    shape, accumulate = (len(x), len(weight)), residual is not None
    if residual is not None:
        check(residual, dtype, shape)
    out = cupy.empty(shape, dtype) if residual is None else residual
    if _fits(x, weight, dtype):
        _launch(out, x, weight, "PLAIN", bias, accumulate=accumulate)
    else:
        _cublas(out, x, weight, bias, accumulate=accumulate)
    return out


def linear_relu(
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array,
    quantized: bool = False,
    out_dtype: np.dtype | None = None,
) -> Array | Quantized:
    """max(x · weightᵀ + bias, 0): (rows, in), (out, in), (out,) -> (rows, out)."""
    if len(x) >= MANY_ROWS:
        return cuda.linear_relu(x, weight, bias, quantized, out_dtype)
    dtype = np.dtype(out_dtype or x.dtype)
    out = cupy.empty((len(x), len(weight)), dtype)
    if _fits(x, weight, dtype):
        _launch(out, x, weight, "RELU", bias)
    else:
        _cublas(out, x, weight, bias, relu=True)
    return cuda.quantize(out) if quantized else out


def linear_swiglu(
    x: Array | Quantized,
    weight: Array | Quantized,
    quantized: bool = False,
    out_dtype: np.dtype | None = None,
) -> Array | Quantized:
    """silu(x · gateᵀ) · (x · upᵀ): (rows, in), (2 · n, in), gate first -> (rows, n)."""
    if len(x) >= MANY_ROWS:
        return cuda.linear_swiglu(x, weight, quantized, out_dtype)
    dtype = np.dtype(out_dtype or x.dtype)
    if not _fits(x, weight, dtype):
        return cuda.swiglu(linear(x, weight, out_dtype=dtype), quantized)
    out = cupy.empty((len(x), len(weight) // 2), dtype)
    _launch(out, x, weight, "SWIGLU")
    return cuda.quantize(out) if quantized else out


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
    """x · weightᵀ + bias with its queries and keys rotated by their positions; see `reference`."""
    heads = (num_heads, num_key_value_heads)
    if len(x) >= MANY_ROWS:
        return cuda.linear_rope(x, weight, bias, positions, cos, sin, *heads, out_dtype)
    dtype = np.dtype(out_dtype or x.dtype)
    if not _fits(x, weight, dtype):
        return cuda.rope(linear(x, weight, bias, out_dtype=dtype), positions, cos, sin, *heads)
    table_rows, half = cos.shape
    check(positions, np.int32, (len(x),))
    check(cos, np.float32, (table_rows, half))
    check(sin, np.float32, (table_rows, half))
    assert len(weight) == (num_heads + 2 * num_key_value_heads) * 2 * half, f"{weight.shape}"
    out = cupy.empty((len(x), len(weight)), dtype)
    rotated = np.int32(sum(heads) * 2 * half)
    _launch(out, x, weight, "ROPE", bias, (positions, cos, sin, rotated))
    return out


def _fits(x: Array | Quantized, weight: Array | Quantized, dtype: np.dtype) -> bool:
    """Whether a kernel of ours takes it: few rows of 16-bit numbers, with such or with int8."""
    if isinstance(x, Quantized) or x.dtype.name not in _DTYPES or not x.size:
        return False
    eight_bit = isinstance(weight, Quantized)
    values = weight.values if eight_bit else weight
    device = cupy.cuda.runtime.getDevice()
    return (
        values.dtype == (np.int8 if eight_bit else x.dtype)
        and dtype in (x.dtype, np.float32)
        and _has_units(device)
        and (len(x) <= GEMV_ROWS or eight_bit and _tile(device, storage(x), len(x)) is not None)
        and x.shape[1] * values.itemsize % 16 == 0
        and (x.data.ptr | values.data.ptr) % 16 == 0
    )


@cache
def _has_units(device: int) -> bool:
    """mma of 16 x 8 x 16 and cp.async came with 8.0."""
    return int(cupy.cuda.Device(device).compute_capability) >= 80


def _launch(
    out: Array,
    x: Array,
    weight: Array | Quantized,
    epilogue: str,
    bias: Array | None = None,
    turn: tuple[Any, ...] = _NO_TURN,
    accumulate: bool = False,
) -> None:
    (m, k), n, eight_bit = x.shape, len(weight), isinstance(weight, Quantized)
    values, scale = (weight.values, weight.scale) if eight_bit else (weight, None)
    check(x, x.dtype, (m, k))
    check(values, values.dtype, (n, k))
    if eight_bit:
        check(scale, np.float32, (n,))
    if bias is not None:
        check(bias, x.dtype, (n,))
    assert epilogue in ("PLAIN", "RELU") or n % 2 == 0, f"{weight.shape}"
    if not out.size:
        return
    device, wide = cupy.cuda.runtime.getDevice(), out.dtype != x.dtype
    # Rows of w between the two of a pair, where the epilogue says it.
    apart = {"SWIGLU": n // 2, "ROPE": 0 if turn[1] is None else turn[1].shape[1]}.get(epilogue)
    arrays = (out, x, values, scale, bias, *turn[:3])
    numbers = (turn[3], np.int32(accumulate))
    if m <= GEMV_ROWS:
        constants = _gemv_constants(device, storage(x), eight_bit, m, k, epilogue, wide)
        launch = _gemv(device, constants, (m, n, apart or 1), arrays, numbers)
    elif few_rows_sm90.fits(device, m, epilogue, apart):
        sizes = (m, n, k, apart or 8)
        launch = few_rows_sm90.launch(device, epilogue, sizes, arrays, numbers, _counters(device))
    else:
        constants = _tile(device, storage(x), m, epilogue, wide)
        launch = _tiles(device, constants, (m, n, k, apart or 8), arrays, numbers)
    if EARLY and _starts_early(device):
        launch_early(*launch)
    else:
        function, blocks, threads, arguments, shared = launch
        function((blocks,), (threads,), arguments, shared_mem=shared)


def _gemv(
    device: int, constants: definitions.Constants, sizes: tuple, arrays: tuple, numbers: tuple
) -> tuple:
    """The launch of gemv.cu: function, blocks, threads, arguments and bytes of shared memory."""
    shared = definitions.gemv_shared_bytes(constants)
    function = kernel("gemv.cu", "gemv", shared, **constants)
    blocks = min(multiprocessors(device), -(-sizes[1] // 2))
    threads = 32 * constants["K_WARPS"] * constants["GROUPS"]
    return function, blocks, threads, (*arrays, *map(np.int32, sizes), *numbers), shared


def _tiles(
    device: int, constants: definitions.Constants, sizes: tuple, arrays: tuple, numbers: tuple
) -> tuple:
    """The launch of few_rows.cu, as `_gemv` has it."""
    (_, n, k, _), tokens, rows = sizes, constants["TOKENS"], constants["ROWS"]
    shared = definitions.few_rows_shared_bytes(constants)
    stage = constants["K_WARPS"] * constants["CHUNKS"] * 64
    items = -(-n // rows) * -(-k // stage)
    blocks = min(_places(device, shared, constants["BLOCKS"]), items)
    parts = cupy.empty((blocks, 2, tokens, rows), np.float32)
    counters = _counters(device)
    assert blocks <= counters.size, f"{blocks} blocks"
    arguments = (*arrays, parts, counters, *map(np.int32, sizes), *numbers)
    threads = 32 * constants["ROW_WARPS"] * constants["TOKEN_WARPS"] * constants["K_WARPS"]
    function = kernel("few_rows.cu", "few_rows", shared, **constants)
    return function, blocks, threads, arguments, shared


@cache
def _starts_early(device: int) -> bool:
    return int(cupy.cuda.Device(device).compute_capability) >= 90


@cache
def _tile(
    device: int, storage: str, rows: int, epilogue: str = "PLAIN", wide: bool = False
) -> definitions.Constants | None:
    """Constants of few_rows.cu, or None: it takes fewer rows."""
    return definitions.few_rows_constants(storage, rows, epilogue, wide, _shared_bytes(device))


@cache
def _gemv_constants(device: int, *shape: Any) -> definitions.Constants:
    return definitions.gemv_constants(*shape, _shared_bytes(device))


def _shared_bytes(device: int) -> int:
    """What a block may have."""
    return cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]


@cache
def _places(device: int, shared: int, most: int) -> int:
    """Blocks that the device has at work at a time, of so many bytes, `most` a multiprocessor."""
    available = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerMultiprocessor"]
    # 1 KiB of each block is the driver's.
    return multiprocessors(device) * max(1, min(most, available // (shared + 1024)))


@cache
def _counters(device: int) -> Array:
    """Zeros, which every launch leaves as it found them: on one stream at a time."""
    # Not of the pool, as the workspace of cuBLASLt; and there before a graph is captured.
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(4 * 16384), 0)
    counters = cupy.ndarray(16384, np.int32, memptr=pointer)
    counters.fill(0)
    return counters


def _cublas(
    y: Array,
    x: Array | Quantized,
    weight: Array | Quantized,
    bias: Array | None,
    accumulate: bool = False,
    relu: bool = False,
) -> None:
    """`gemm` with an algorithm for about so many rows; beside fp8 weights x is quantized."""
    if not y.size:
        return
    # Beside 8-bit operands all sizes should be multiples of 16: what is chosen for 16 rows does for
    # fewer.
    least = 1
    if isinstance(weight, Quantized) and weight.kind == "int8":
        weight = cuda.dequantize(weight, x.dtype)
    elif isinstance(weight, Quantized):
        x = x if isinstance(x, Quantized) else cuda.quantize(x)
        least = 16
    chosen_for = max(1 << (len(x) - 1).bit_length(), least)
    gemm(y, x, weight, accumulate, bias, relu, chosen_for)
