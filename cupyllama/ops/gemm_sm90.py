"""Matrix products by our own kernel, with what follows them, for compute capability 9.0."""

import ctypes
import functools
from typing import Any

import cupy
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops.arrays import check, multiprocessors, storage
from cupyllama.quantized import Quantized

Array = cupy.ndarray

# Where ROPE finds both halves of a pair in one thread.
HEAD_DIMS = (64, 128)

_DTYPES = ("float16", "bfloat16")
_THREADS = 384

_PITCH = definitions.PITCH

# CUtensorMapDataType, CUtensorMapSwizzle and CUtensorMapL2promotion
_UINT8 = 0
_SWIZZLE_128B = 3
_L2_256B = 3


def fits(
    x: Array | Quantized,
    weight: Array | Quantized,
    dtype: np.dtype,
    head_dim: int | None = None,
) -> bool:
    """Whether the current device and these operands allow `linear_swiglu`.

    Args:
        dtype: of the result.
        head_dim: given, whether they allow `linear_rope` for heads of that size.
    """
    eight_bit = isinstance(weight, Quantized)
    if eight_bit != isinstance(x, Quantized) or not is_hopper(_device()):
        return False
    arrays = (x.values, x.scale, weight.values, weight.scale) if eight_bit else (x, weight)
    row_bytes = x.shape[1] * arrays[0].itemsize
    return (
        np.dtype(dtype).name in _DTYPES
        and (eight_bit or x.dtype == weight.dtype == dtype)
        and (not head_dim or head_dim in HEAD_DIMS)
        and len(weight) % (head_dim or 2 * 64) == 0
        and row_bytes % _PITCH == 0
        and row_bytes > 0
        and all(array.data.ptr % 16 == 0 for array in arrays)
    )


def linear_swiglu(out: Array, x: Array | Quantized, weight: Array | Quantized) -> None:
    """out = silu(x · gateᵀ) · (x · upᵀ), rounded once: (m, n), (m, k), (2 · n, k), gate first.

    Args:
        out: float16 or bfloat16.
        x, weight: of the type of `out`, or both quantized; such that they fit.
    """
    assert len(weight) == 2 * out.shape[1], f"{weight.shape} {out.shape}"
    _launch(out, x, weight, "SWIGLU", 0, (None, None, None, np.int32(0)))


def linear_rope(
    out: Array,
    x: Array | Quantized,
    weight: Array | Quantized,
    positions: Array,
    cos: Array,
    sin: Array,
    rotated_columns: int,
) -> None:
    """out = x · weightᵀ, its first heads rotated, rounded once: (m, n), (m, k), (n, k).

    Args:
        out: float16 or bfloat16; q, k and v side by side.
        x, weight: of the type of `out`, or both quantized; such that they fit.
        positions: (m,) int32.
        cos, sin: (positions, head_dim / 2) float32.
        rotated_columns: of q and k together.
    """
    m, (table_rows, half) = len(out), cos.shape
    assert len(weight) == out.shape[1], f"{weight.shape} {out.shape}"
    assert 2 * half in HEAD_DIMS and rotated_columns % (2 * half) == 0, (
        f"{half=} {rotated_columns=}"
    )
    check(positions, np.int32, (m,))
    check(cos, np.float32, (table_rows, half))
    check(sin, np.float32, (table_rows, half))
    turn = (positions, cos, sin, np.int32(rotated_columns))
    _launch(out, x, weight, "ROPE", 2 * half, turn)


def _launch(
    out: Array,
    x: Array | Quantized,
    weight: Array | Quantized,
    epilogue: str,
    head_dim: int,
    turn: tuple[Any, ...],
) -> None:
    (m, n), (rows, k), eight_bit = out.shape, weight.shape, isinstance(weight, Quantized)
    scales = (x.scale, weight.scale) if eight_bit else (None, None)
    if eight_bit:
        assert isinstance(x, Quantized), f"{type(x)}"
        check(x.scale, np.float32, (m,))
        check(weight.scale, np.float32, (rows,))
        x, weight = x.values, weight.values
    assert out.dtype.name in _DTYPES, f"{out.dtype}"
    check(out, out.dtype, (m, n))
    check(x, np.uint8 if eight_bit else out.dtype, (m, k))
    check(weight, x.dtype, (rows, k))
    row_bytes = k * x.itemsize
    assert n % 64 == 0 and row_bytes % _PITCH == 0 and row_bytes, f"{n=} {row_bytes=}"
    if not out.size:
        return
    constants = definitions.gemm_sm90_constants(storage(out), epilogue, eight_bit, head_dim)
    tile_m, tile_n, cluster = (constants[name] for name in ("TILE_M", "TILE_N", "CLUSTER"))
    width = tile_n // 2 if epilogue == "SWIGLU" else tile_n
    tiles = -(-m // (cluster * tile_m)) * -(-n // width)  # of a whole cluster
    arguments = (
        out,
        tensor_map(x.data.ptr, m, row_bytes, tile_m),
        tensor_map(weight.data.ptr, rows, row_bytes, tile_n // cluster),
        *scales,
        *turn,
        np.int32(m),
        np.int32(n),
        np.int32(row_bytes // _PITCH),
    )
    shared = definitions.gemm_sm90_shared_bytes(constants)
    launch = kernel("gemm_sm90.cu", "gemm_sm90", shared, **constants)
    grid = min(multiprocessors(_device()) // cluster, tiles) * cluster
    launch((grid,), (_THREADS,), arguments, shared_mem=shared)


def _device() -> int:
    return cupy.cuda.runtime.getDevice()


@functools.cache
def is_hopper(device: int) -> bool:
    """wgmma is of 9.0 alone, neither of what came before nor of what came after."""
    return cupy.cuda.Device(device).compute_capability == "90"


@functools.lru_cache(maxsize=4096)
def tensor_map(pointer: int, rows: int, row_bytes: int, box_rows: int) -> np.ndarray:
    """A CUtensorMap of a matrix in boxes of 128 bytes of `box_rows` rows, zero beyond its end.

    It says nothing but what the arguments do, and owns nothing: it may outlive the array, and is
    right for another one of the same shape at the same place.
    """
    encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    room = np.zeros(128 + 64, np.uint8)
    at = -room.ctypes.data % 64  # the driver wants it aligned; the launch copies it from anywhere
    encoded = room[at : at + 128]
    status = encode(
        ctypes.c_void_p(encoded.ctypes.data),
        ctypes.c_int(_UINT8),
        ctypes.c_uint32(2),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(row_bytes, rows),
        (ctypes.c_uint64 * 1)(row_bytes),
        (ctypes.c_uint32 * 2)(_PITCH, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_L2_256B),
        ctypes.c_int(0),
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled({rows=}, {row_bytes=}, {box_rows=}): {status}")
    # An array of one item is what CuPy passes to a kernel by value.
    return encoded.view(np.dtype((np.void, 128)))
