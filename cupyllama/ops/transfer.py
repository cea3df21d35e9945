"""The way of weights to a GPU: pinned buffers, each copied on while the other is filled."""

from collections.abc import Callable
from functools import partial
from itertools import cycle

import cupy
import numpy as np
from cupy.cuda import runtime

Array = cupy.ndarray


class PinnedBuffer:
    """Host memory that the device copies from by itself, and an event to tell when it has."""

    def __init__(self, nbytes: int):
        # Not from CuPy's pool, which would keep it for good.
        memory = cupy.cuda.PinnedMemory(nbytes, runtime.hostAllocPortable)
        pointer = cupy.cuda.PinnedMemoryPointer(memory, 0)
        self.bytes = np.frombuffer(pointer, np.uint8, nbytes)
        self.address = pointer.ptr
        # A thread that spins while it waits would take a core from one that reads.
        self.copied = cupy.cuda.Event(block=True, disable_timing=True)


class DeviceWriter:
    """Fills arrays in device memory from one thread, through two pinned buffers on a stream.

    What was written is there after the `with` block; before its end, no array may be freed.
    """

    def __init__(self, device: int, nbytes: int):
        """`nbytes`: the size of a buffer, not less than that of an element."""
        cupy.cuda.Device(device).use()  # of this thread
        self.nbytes = nbytes
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.buffers = cycle([PinnedBuffer(nbytes), PinnedBuffer(nbytes)])

    def __enter__(self) -> Callable:
        return self.write

    def __exit__(self, *error: object) -> None:
        self.stream.synchronize()

    def write(
        self, target: Array, first: int, count: int, fill: Callable[[np.ndarray], None]
    ) -> None:
        """Elements first:first + count of `target`, as `fill` writes them to a host array."""
        nbytes = count * target.itemsize
        if nbytes > self.nbytes:
            return self._write_in_parts(target, first, count, fill)
        buffer = next(self.buffers)
        buffer.copied.synchronize()  # done at once where nothing was ever copied
        fill(buffer.bytes[:nbytes].view(target.dtype))
        to, kind = target.data.ptr + first * target.itemsize, runtime.memcpyHostToDevice
        runtime.memcpyAsync(to, buffer.address, nbytes, kind, self.stream.ptr)
        buffer.copied.record(self.stream)

    def _write_in_parts(
        self, target: Array, first: int, count: int, fill: Callable[[np.ndarray], None]
    ) -> None:
        """What cannot be filled in parts is filled in pageable memory, then copied in parts."""
        whole, step = np.empty(count, target.dtype), self.nbytes // target.itemsize
        fill(whole)
        for begin in range(0, count, step):
            part = whole[begin : begin + step]
            self.write(target, first + begin, len(part), partial(np.copyto, src=part))


def device_writers(nbytes: int) -> Callable[[], DeviceWriter]:
    """What makes the writer of each thread, all for the device that is current here."""
    # CuPy's pool hands memory out again while kernels of the current stream still use it, and the
    # writers' streams wait for nobody.
    cupy.cuda.get_current_stream().synchronize()
    return partial(DeviceWriter, cupy.cuda.Device().id, nbytes)
