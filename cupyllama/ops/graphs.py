"""Launches captured once as a CUDA graph, and replayed by one call."""

from collections.abc import Callable
from contextlib import suppress

import cupy

from cupyllama.ops.cuda import memory_errors, release_memory


class Graphs:
    """Captures graphs whose launches share memory of their own: one of them runs at a time."""

    def __init__(self) -> None:
        # Not CuPy's default stream, which cannot be captured, nor one that waits for it.
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pool = cupy.cuda.MemoryPool(_malloc)

    def capture(self, work: Callable[[], None]) -> cupy.cuda.Graph:
        """What `work` queues, as a graph. It is called twice, and what it queues runs once."""
        cupy.cuda.get_current_stream().synchronize()  # a graph may be at work in that memory
        with self._stream, cupy.cuda.using_allocator(self._pool.malloc):
            work()  # all is compiled now, and the pool has the memory that it takes
            self._stream.begin_capture()
            try:
                work()
            except BaseException:
                with suppress(Exception):
                    self._stream.end_capture()
                raise
            graph = self._stream.end_capture()
        self._stream.synchronize()
        return graph


def _malloc(nbytes: int) -> cupy.cuda.MemoryPointer:
    """As CuPy allocates, but a pool that sees this error does not free what it has.

    Graphs use memory that counts as free in the pool.
    """
    try:
        with memory_errors():
            return cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
    except MemoryError:
        release_memory()  # of CuPy's own pool
        with memory_errors():
            return cupy.cuda.MemoryPointer(cupy.cuda.Memory(nbytes), 0)
