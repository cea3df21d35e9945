"""What a kernel is told of an array, checked, for it sees a bare pointer; and of the device."""

from functools import cache
from typing import Any

import cupy
import numpy as np

_STORAGE = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def check(array: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Whether an array on the device is what a kernel takes it for."""
    assert array.dtype == dtype, f"{array.dtype} instead of {dtype}"
    assert array.shape == shape, f"{array.shape} instead of {shape}"
    assert array.flags.c_contiguous, f"{array.shape} has strides {array.strides}"
    # Index arrays are read one by one; whatever holds numbers is read 16 bytes at a time.
    assert dtype == np.int32 or array.data.ptr % 16 == 0, f"{array.data.ptr:#x} is not aligned"


def storage(array: Any) -> str:
    """STORAGE of a kernel on such arrays."""
    return _STORAGE[array.dtype.name]


@cache
def multiprocessors(device: int) -> int:
    """How many the device has."""
    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]
