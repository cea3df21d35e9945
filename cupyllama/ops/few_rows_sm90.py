"""Products of int8 weights with 5 to 128 rows, for compute capability 9.0.

Faster than few_rows.cu but for the smallest: 4,096 x 4,096 by 8 rows takes 12.7 us, and 11.1.
"""

from typing import Any

import cupy
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops.arrays import multiprocessors, storage
from cupyllama.ops.gemm_sm90 import is_hopper, tensor_map

_THREADS = 640
_ROWS = definitions.FEW_ROWS_SM90_TILE
_STAGE = definitions.FEW_ROWS_SM90_STAGE


def fits(device: int, rows: int, epilogue: str, apart: int | None) -> bool:
    """Whether the kernel takes so many rows of x, of what few_rows.cu takes of int8.

    Heads must lie in a tile as a whole.

    Args:
        epilogue: PLAIN, RELU, SWIGLU or ROPE.
        apart: with ROPE, half a head.
    """
    return (
        is_hopper(device)
        and rows <= max(definitions.FEW_ROWS_SM90)
        and (epilogue != "ROPE" or apart % 8 == 0 and _ROWS // 2 % apart == 0)
    )


def launch(
    device: int,
    epilogue: str,
    sizes: tuple[int, int, int, int],
    arrays: tuple[Any, ...],
    numbers: tuple[Any, ...],
    counters: cupy.ndarray,
) -> tuple:
    """What to launch: function, blocks, threads, arguments and bytes of shared memory.

    Args:
        sizes: m, n, k, and how far the rows of a pair lie apart.
        arrays: out, x, the values of the weight, and the others that follow them in the kernel.
        numbers: the last arguments.
        counters: int32 zeros, which the launch leaves as it finds them.
    """
    (m, n, k, _), (out, x, values, *others) = sizes, arrays
    wide = out.dtype != x.dtype
    constants = definitions.few_rows_sm90_constants(storage(x), m, epilogue, wide)
    tokens, tiles = constants["TOKENS"], -(-n // _ROWS)
    blocks = _blocks(multiprocessors(device), tiles, -(-k // _STAGE))
    pieces = None if blocks == tiles else cupy.empty((blocks, 2, tokens, _ROWS), np.float32)
    assert values.dtype == np.int8 and k % 16 == 0, f"{values.dtype} {k=}"
    assert 4 * blocks <= counters.size, f"{blocks} blocks"
    arguments = (
        out,
        tensor_map(x.data.ptr, m, k * x.itemsize, tokens),
        tensor_map(values.data.ptr, n, k, _ROWS // 2),
        *others,
        pieces,
        counters,
        *map(np.int32, sizes),
        *numbers,
    )
    shared = definitions.few_rows_sm90_shared_bytes(constants)
    function = kernel("few_rows_sm90.cu", "few_rows_sm90", shared, **constants)
    return function, blocks, _THREADS, arguments, shared


def _blocks(places: int, tiles: int, stages: int) -> int:
    """How many share the work: as many as tiles or a multiple of it, where there are places.

    Pieces of tiles are written, and read again by whoever finishes them: with 32 rows of x the 84
    tiles of 21,504 rows of 7,168 take 60 us by 84 blocks, 67 by 132. Only from 128 rows on, and
    where a third of the places is left empty, all blocks would be faster, by 2 to 7 %.
    """
    return min(places // tiles, stages) * tiles or places
