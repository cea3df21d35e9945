"""Rows of a checkpoint as e4m3 on a CPU: the very bits of `ops.reference.quantize`, faster.

ml_dtypes converts 0.1 billion numbers a second, in one thread at a time. A table does 0.5 billion
on every core, so that a core quantizes 0.4 GB of float16 a second.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from functools import cache

import ml_dtypes
import numpy as np

from cupyllama.checkpoint.source import Checkpoint, numpy_dtype
from cupyllama.quantized import LARGEST, Quantized

_LARGEST = np.float32(LARGEST["fp8"])
_TINY = np.finfo(np.float32).tiny
_BLOCK = 1 << 16  # numbers converted at a time: what is made of them stays in a core's cache


def quantized_rows(
    checkpoint: Checkpoint, name: str, block_bytes: int, pool: Executor, ahead: int
) -> Iterator[Quantized]:
    """A matrix as stored, quantized in blocks of rows, in order.

    Args:
        block_bytes: of the values of a block.
        pool: the threads that read and convert.
        ahead: blocks that they may be at while one is used here.
    """
    tensor = checkpoint.tensors[name]
    rows, columns = tensor.shape

    def work(first: int, last: int) -> Quantized:
        x = np.empty((last - first, columns), numpy_dtype(tensor))
        checkpoint.read_rows(name, first, x)
        return quantize_rows(x)

    step = max(1, block_bytes // columns)
    begun: deque[Future[Quantized]] = deque()
    for first in range(0, rows, step):
        begun.append(pool.submit(work, first, min(first + step, rows)))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def quantize_rows(x: np.ndarray, out: Quantized | None = None) -> Quantized:
    """As `ops.reference.quantize`: (rows, columns) of any float dtype."""
    if out is None:
        out = Quantized(np.empty(x.shape, np.uint8), np.empty(len(x), np.float32))
    step = max(1, _BLOCK // max(1, x.shape[1]))
    for first in range(0, len(x), step):
        block = slice(first, first + step)
        numbers = _float32(x[block])
        scale = np.fmax.reduce(np.abs(numbers), axis=1, initial=0) / _LARGEST
        scale[scale < _TINY] = 1
        with np.errstate(invalid="ignore"):  # infinity times 0
            numbers = numbers * (1 / scale)[:, None]
        np.clip(numbers, -_LARGEST, _LARGEST, out=numbers)
        out.values[block], out.scale[block] = e4m3_bits(numbers), scale
    return out


def e4m3_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest e4m3, ties to even."""
    bits = x.view(np.uint32)
    # The upper half has all that rounding asks for, if its last bit says that more follows: numbers
    # between two of e4m3 have their middle at 5 significant bits, and it has 8.
    upper = bits >> 16
    upper |= (bits & 0xFFFF) != 0
    return _table()[upper]


@cache
def _table() -> np.ndarray:
    """e4m3 of every upper half of a float32."""
    halves = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaN
        return halves.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _float32(x: np.ndarray) -> np.ndarray:
    if x.dtype == ml_dtypes.bfloat16:  # the upper half; converting it would be in one thread
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)
