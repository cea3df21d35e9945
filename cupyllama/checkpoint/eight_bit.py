"""Rows of a checkpoint as 8-bit numbers on a CPU: the very bits of `ops.reference.quantize`."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future

import ml_dtypes
import numpy as np

from cupyllama.checkpoint.e4m3 import e4m3_bits
from cupyllama.checkpoint.source import Checkpoint, numpy_dtype
from cupyllama.ops import reference
from cupyllama.quantized import LARGEST, VALUE_DTYPES, Quantized

_LARGEST = np.float32(LARGEST["fp8"])
_TINY = np.finfo(np.float32).tiny
_BLOCK = 1 << 16  # numbers converted at a time: what is made of them stays in a core's cache


def quantized_rows(
    checkpoint: Checkpoint, name: str, kind: str, block_bytes: int, pool: Executor, ahead: int
) -> Iterator[Quantized]:
    """A matrix as stored, quantized in blocks of rows, in order.

    Args:
        kind: fp8 or int8.
        block_bytes: of the values of a block.
        pool: the threads that read and convert.
        ahead: blocks that they may be at while one is used here.
    """
    tensor = checkpoint.tensors[name]
    rows, columns = tensor.shape

    def work(first: int, last: int) -> Quantized:
        x = np.empty((last - first, columns), numpy_dtype(tensor))
        checkpoint.read_rows(name, first, x)
        return quantize_rows(x, kind=kind)

    step = max(1, block_bytes // columns)
    begun: deque[Future[Quantized]] = deque()
    for first in range(0, rows, step):
        begun.append(pool.submit(work, first, min(first + step, rows)))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def quantize_rows(x: np.ndarray, out: Quantized | None = None, kind: str = "fp8") -> Quantized:
    """As `ops.reference.quantize`: (rows, columns) of any float dtype."""
    if out is None:
        out = Quantized(np.empty(x.shape, VALUE_DTYPES[kind]), np.empty(len(x), np.float32))
    step = max(1, _BLOCK // max(1, x.shape[1]))
    quantize_block = _as_fp8 if out.kind == "fp8" else reference.quantize
    for first in range(0, len(x), step):
        block = slice(first, first + step)
        quantize_block(_float32(x[block]), Quantized(out.values[block], out.scale[block]))
    return out


def _as_fp8(x32: np.ndarray, out: Quantized) -> None:
    """By the table of e4m3.py, where the reference asks ml_dtypes."""
    scale = np.fmax.reduce(np.abs(x32), axis=1, initial=0) / _LARGEST
    scale[scale < _TINY] = 1
    with np.errstate(invalid="ignore"):  # infinity times 0
        numbers = x32 * (1 / scale)[:, None]
    np.clip(numbers, -_LARGEST, _LARGEST, out=numbers)
    out.values[...], out.scale[...] = e4m3_bits(numbers), scale


def _float32(x: np.ndarray) -> np.ndarray:
    if x.dtype == ml_dtypes.bfloat16:  # the upper half; converting it would be in one thread
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)
