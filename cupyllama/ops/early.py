"""Kernels that start before the one in front of them is done, from compute capability 9.0 on.

CuPy launches without attributes, so this goes to the driver.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import cupy
import numpy as np

# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def launch_early(
    function: Callable, blocks: int, threads: int, arguments: Sequence[Any], shared_bytes: int
) -> None:
    """Queue a kernel on the current stream that may start while the one before it is at work.

    Before it has executed `griddepcontrol.wait` it must write nothing, and read nothing that a
    kernel writes which may be at work; common.cuh says why that is enough.

    Args:
        function: as `kernels.kernel` returned it.
        arguments: arrays, None for a null pointer, numbers of NumPy, or arrays of NumPy, of which
            the kernel gets the bytes.
    """
    raw = getattr(function, "kernel", None)
    if raw is None:  # each launch is watched: CUPYLLAMA_DEBUG
        function((blocks,), (threads,), arguments, shared_mem=shared_bytes)
        return
    values = [_value(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value[0] = 1
    stream = cupy.cuda.get_current_stream().ptr
    config = _Config((blocks, 1, 1), (threads, 1, 1), shared_bytes, stream)
    config.attributes, config.attribute_count = ctypes.pointer(attribute), 1
    status = _launch()(ctypes.byref(config), ctypes.c_void_p(raw.ptr), pointers, None)
    if status:
        raise RuntimeError(f"cuLaunchKernelEx: status {status}")


@cache
def _launch() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


def _value(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, cupy.ndarray):
        return ctypes.c_void_p(argument.data.ptr)
    if isinstance(argument, np.ndarray):
        return (ctypes.c_char * argument.nbytes).from_buffer(argument)
    return np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())
