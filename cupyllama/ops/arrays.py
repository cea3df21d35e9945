"""What a kernel is told of an array, checked, for it sees a bare pointer; and of the device."""

import math
from functools import cache
from typing import Any

import cupy
import numpy as np

_STORAGE = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def check(array: Any, dtype: np.dtype, shape: tuple[int, ...], one_by_one: bool = False) -> None:
    """Whether an array on the device is what a kernel takes it for.

    Args:
        one_by_one: how its numbers are read; else 16 bytes at a time where rows have so many. Index
            arrays always are.
    """
    assert array.dtype == dtype, f"{array.dtype} instead of {dtype}"
    assert array.shape == shape, f"{array.shape} instead of {shape}"
    assert array.flags.c_contiguous, f"{array.shape} has strides {array.strides}"
    one_by_one = one_by_one or dtype == np.int32
    unit = array.itemsize if one_by_one else math.gcd(16, shape[-1] * array.itemsize)
    assert array.data.ptr % unit == 0, f"{array.data.ptr:#x} is not aligned to {unit}"


def storage(array: Any) -> str:
    """STORAGE of a kernel on such arrays."""
    return _STORAGE[array.dtype.name]


@cache
def multiprocessors(device: int) -> int:
    """How many the device has."""
    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]
