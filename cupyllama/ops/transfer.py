"""The way of weights to a GPU: pinned buffers, each copied on while another is filled."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import cycle

import cupy
import numpy as np
from cupy.cuda import runtime

Array = cupy.ndarray
_PAGE = 4096
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class PinnedBuffer:
    """Host memory that the device copies from by itself, and the stream on which it does.

    As long as waiting is for the stream, all that a copy needs lets other threads run Python while
    it is in the driver. CuPy's Event.record does not, and may wait there for a lock.
    """

    def __init__(self, memory: np.ndarray, blocking: bool):
        self.bytes = memory
        self.address = memory.ctypes.data
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.copied = cupy.cuda.Event(block=True, disable_timing=True) if blocking else None
        # Until all that was copied is there: at once where nothing was.
        self.wait = (self.copied or self.stream).synchronize

    def copy_to(self, address: int, nbytes: int) -> None:
        """Begin to copy the first `nbytes` of the buffer to device memory."""
        kind = runtime.memcpyHostToDevice
        runtime.memcpyAsync(address, self.address, nbytes, kind, self.stream.ptr)
        if self.copied is not None:
            self.copied.record(self.stream)


class DeviceWriter:
    """Fills arrays in device memory from one thread, through pinned buffers used in turn.

    What was written is there after the `with` block; before its end, no array may be freed.
    """

    def __init__(self, device: int, nbytes: int, buffers: int, blocking: bool):
        """
        Args:
            nbytes: the size of a buffer, not less than that of an element.
            blocking: sleep while waiting for a copy, rather than spin, which wakes up sooner.
        """
        cupy.cuda.Device(device).use()  # of this thread
        self.nbytes = nbytes
        room = -(-nbytes // _PAGE) * _PAGE
        self.memory = _pinned(buffers * room)
        self.buffers = [PinnedBuffer(row, blocking) for row in self.memory.reshape(buffers, room)]
        self.turns = cycle(self.buffers)

    def __enter__(self) -> Callable:
        return self.write

    def __exit__(self, *error: object) -> None:
        for buffer in self.buffers:
            buffer.stream.synchronize()
        runtime.hostUnregister(self.memory.ctypes.data)

    def write(
        self,
        target: Array,
        first: int,
        count: int,
        step: int,
        fill: Callable[[np.ndarray, int], None],
    ) -> Iterator[None]:
        """Elements first:first + count of `target`, yielding after every `step` of them.

        Args:
            fill: writes as many of them as a flat host array takes, from an index on.
        """
        dtype, size = target.dtype, target.itemsize
        to = target.data.ptr + first * size
        if step * size > self.nbytes:
            # What cannot be filled in parts is filled in pageable memory, then copied in parts.
            step, fill = self.nbytes // size, _filled(np.empty(count, dtype), fill)
        for begin in range(0, count, step):
            nbytes = min(step, count - begin) * size
            buffer = next(self.turns)
            buffer.wait()
            fill(buffer.bytes[:nbytes].view(dtype), begin)
            buffer.copy_to(to + begin * size, nbytes)
            yield


def device_writers(nbytes: int, buffers: int, blocking: bool) -> Callable[[], DeviceWriter]:
    """What makes the writer of each thread, all for the device that is current here."""
    # CuPy's pool hands memory out again while kernels of the current stream still use it, and the
    # writers' streams wait for nobody.
    cupy.cuda.get_current_stream().synchronize()
    return partial(DeviceWriter, cupy.cuda.Device().id, nbytes, buffers, blocking)


def _pinned(nbytes: int) -> np.ndarray:
    """Pinned memory as bytes, until it is unregistered.

    Huge pages that are registered take a third of the time of pages that the driver allocates:
    milliseconds a thread, which is a good part of what loading a few gigabytes takes.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    pinned = np.frombuffer(memory, np.uint8)
    runtime.hostRegister(pinned.ctypes.data, nbytes, _PORTABLE)
    return pinned


def _filled(
    whole: np.ndarray, fill: Callable[[np.ndarray, int], None]
) -> Callable[[np.ndarray, int], None]:
    """`whole`, filled now, as what fills parts of it."""
    fill(whole, 0)
    return lambda out, begin: np.copyto(out, whole[begin : begin + len(out)])
