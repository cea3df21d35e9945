"""The way of weights to a GPU: pinned buffers, each copied on while others are filled.

By `copy_extents` what lies in files as it is wanted, by `device_writers` what does not.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from math import prod
from typing import TYPE_CHECKING

import cupy
import numpy as np
from cupy.cuda import runtime

from cupyllama.ops.cuda import quantize
from cupyllama.pages import huge_pages, whole_pages
from cupyllama.quantized import Quantized

if TYPE_CHECKING:
    from cupyllama.chunks import Chunk, Extent, Fill
    from cupyllama.readers import Readers

    Piece = tuple[Extent, int, int, int]  # where in the extent, the address it goes to, bytes

Array = cupy.ndarray
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class PinnedMemory:
    """The buffers of all threads, registered with the driver by the first that has filled its own.

    By then the others have touched most of theirs: 112 MiB take 3 ms if all is touched, 49 if
    nothing is, and 33 where each thread registers its own.
    """

    def __init__(self, threads: int, buffers: int, nbytes: int):
        room = whole_pages(nbytes)
        self.bytes = huge_pages(threads * buffers * room)
        self.parts = list(self.bytes.reshape(threads, buffers, room))  # of a thread each
        self.registered = False
        self._lock = threading.Lock()

    def register(self) -> None:
        """Let the device copy from it by itself."""
        with self._lock:
            if not self.registered:
                runtime.hostRegister(self.bytes.ctypes.data, self.bytes.nbytes, _PORTABLE)
                self.registered = True

    def unregister(self) -> None:
        """Harmless where nothing is registered."""
        if self.registered:
            runtime.hostUnregister(self.bytes.ctypes.data)


class PinnedBuffer:
    """Host memory that the device copies from by itself, and the stream on which it does.

    All that a copy needs, and waiting for the stream, lets other threads run Python while it is in
    the driver. CuPy's Event.record does not, and may wait there for a lock.
    """

    def __init__(self, memory: np.ndarray):
        self.bytes = memory
        self.address = memory.ctypes.data
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def copy_to(self, address: int, nbytes: int) -> None:
        """Begin to copy the first `nbytes` of the buffer to device memory."""
        kind = runtime.memcpyHostToDevice
        runtime.memcpyAsync(address, self.address, nbytes, kind, self.stream.ptr)


class DeviceWriter:
    """Fills arrays in device memory from one thread, through pinned buffers used in turn.

    What was written is there after the `with` block; before its end, no array may be freed. Rows to
    be quantized are staged in device memory, and quantized when the next ones are about to follow:
    the thread has long filled another buffer then, and waits for nothing.
    """

    def __init__(self, device: int, memory: PinnedMemory, staging: list[Array]):
        cupy.cuda.Device(device).use()  # of this thread
        self.memory = memory
        self.buffers = [PinnedBuffer(row) for row in memory.parts.pop()]
        self.turns = cycle(self.buffers)
        self.staging = staging.pop() if staging else None
        self.staged: tuple[Array, Quantized] | None = None
        # Filled and not yet on their way: until there is no other buffer, then all is registered.
        self.filled: list[tuple[PinnedBuffer, int, int]] = []

    def __enter__(self) -> Callable:
        return self.write

    def __exit__(self, *error: object) -> None:
        try:
            if error == (None, None, None):
                self._copy_filled()
                self._quantize_staged()
        finally:
            for buffer in self.buffers:
                buffer.stream.synchronize()

    def write(self, chunk: "Chunk") -> Iterator[None]:
        """The chunk into its target, yielding after every step."""
        target, dtype = chunk.target, chunk.dtype
        count, size = prod(target.shape), dtype.itemsize
        step, fill = chunk.step, chunk.fill
        if step * size > len(self.buffers[0].bytes):
            # What cannot be filled in parts is filled in pageable memory, then copied in parts.
            step = len(self.buffers[0].bytes) // size
            fill = _filled(np.empty(count, dtype), fill)
        quantizing = isinstance(target, Quantized)
        to = (self.staging if quantizing else target).data.ptr
        for begin in range(0, count, step):
            nbytes = min(step, count - begin) * size
            buffer = next(self.turns)
            buffer.stream.synchronize()
            fill(buffer.bytes[:nbytes].view(dtype), begin)
            if quantizing and begin == 0:
                self._copy_filled()
                self._quantize_staged()
            self.filled.append((buffer, to + begin * size, nbytes))
            if self.memory.registered or len(self.filled) == len(self.buffers):
                self._copy_filled()
            yield
        if quantizing:
            rows = self.staging[: count * size].view(dtype).reshape(target.shape)
            self.staged = rows, target

    def _copy_filled(self) -> None:
        if self.filled:
            self.memory.register()
        for buffer, address, nbytes in self.filled:
            buffer.copy_to(address, nbytes)
        self.filled.clear()

    def _quantize_staged(self) -> None:
        """Quantize what is staged, so that other rows can take its place."""
        if self.staged is None:
            return
        for buffer in self.buffers:
            buffer.stream.synchronize()
        with self.buffers[0].stream as stream:
            quantize(*self.staged)
            stream.synchronize()
        self.staged = None


@contextmanager
def device_writers(
    threads: int, buffers: int, nbytes: int, staging_bytes: int = 0
) -> Iterator[Callable[[], DeviceWriter]]:
    """What makes the writer of each thread, all for the device that is current here.

    Args:
        buffers, nbytes: of each thread, and the size of one, not less than that of an element.
        staging_bytes: device memory of each thread for rows that are to be quantized.
    """
    memory = PinnedMemory(threads, buffers, nbytes)
    room = whole_pages(staging_bytes)  # so that each thread's is aligned
    staging = list(cupy.empty((threads, room), np.uint8)) if room else []
    # CuPy's pool hands memory out again while kernels of the current stream still use it, and the
    # writers' streams wait for nobody.
    cupy.cuda.get_current_stream().synchronize()
    try:
        yield partial(DeviceWriter, cupy.cuda.Device().id, memory, staging)
    finally:
        memory.unregister()


def copy_extents(
    chunks: Iterable["Chunk"],
    readers: "Readers",
    on_copied: Callable[[int], None] = lambda count: None,
) -> None:
    """Have the files' bytes read by `readers`, and copy them to the chunks' targets.

    Args:
        chunks: each with an extent.
        on_copied: called with bytes that are there.

    Raises:
        ModelError: a file ends early, or cannot be read.
    """
    buffers = [PinnedBuffer(row) for row in readers.memory]
    pieces = _pieces(chunks, readers.memory.shape[1])
    asked: dict[int, Piece] = {}  # by buffer
    copying: deque[tuple[int, int]] = deque()  # buffer, bytes
    registered: set[int] = set()

    def ask(buffer: int) -> None:
        if (piece := next(pieces, None)) is not None:
            asked[buffer] = piece
            extent, begin, _, nbytes = piece
            try:
                readers.ask(buffer, extent.file, extent.offset + begin, nbytes)
            except OSError as error:
                extent.check(nbytes, -error.errno)

    cupy.cuda.get_current_stream().synchronize()  # as in `device_writers`
    try:
        for buffer in range(len(buffers)):
            ask(buffer)
        while asked or copying:
            for buffer, found in readers.answers() if asked else ():
                extent, _, address, nbytes = asked.pop(buffer)
                extent.check(nbytes, found)
                if buffer not in registered:  # now that it has been touched, which is much faster
                    memory = readers.memory[buffer]
                    runtime.hostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE)
                    registered.add(buffer)
                buffers[buffer].copy_to(address, nbytes)
                copying.append((buffer, nbytes))
            copied = 0
            while copying:
                buffer, nbytes = copying[0]
                if not asked:
                    buffers[buffer].stream.synchronize()
                elif not buffers[buffer].stream.done:
                    break
                copying.popleft()
                copied += nbytes
                ask(buffer)
            on_copied(copied)
    finally:
        for buffer in buffers:
            buffer.stream.synchronize()
        for buffer in registered:
            runtime.hostUnregister(buffers[buffer].address)


def _pieces(chunks: Iterable["Chunk"], nbytes: int) -> Iterator["Piece"]:
    """Chunks cut to `nbytes`."""
    for chunk in chunks:
        address, size = chunk.target.data.ptr, chunk.nbytes
        for begin in range(0, size, nbytes):
            yield chunk.extent, begin, address + begin, min(nbytes, size - begin)


def _filled(whole: np.ndarray, fill: "Fill") -> "Fill":
    """`whole`, filled now, as what fills parts of it."""
    fill(whole, 0)
    return lambda out, begin: np.copyto(out, whole[begin : begin + len(out)])
