"""Files read into memory by threads of the C library: `aio_read` of glibc, POSIX.1-2008.

They run no Python. Threads that do hand it on to one another for every piece, and to the thread
that tokenises.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINPROGRESS, EINTR
from functools import cache
from typing import Any

import numpy as np

from cupyllama.pages import huge_pages, whole_pages

_SIGEV_NONE = 1


class _Request(ctypes.Structure):
    """`struct aiocb` of glibc's <aio.h>, where pointers have 64 bits."""

    _fields_ = (
        ("file", ctypes.c_int),
        ("opcode", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("nbytes", ctypes.c_size_t),
        ("signal_value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("signal_rest", ctypes.c_char * 48),
        ("next", ctypes.c_void_p),
        ("absolute_priority", ctypes.c_int),
        ("policy", ctypes.c_int),
        ("error", ctypes.c_int),  # EINPROGRESS while it is under way
        ("count", ctypes.c_ssize_t),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_char * 32),
    )


class _Settings(ctypes.Structure):
    """`struct aioinit`."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("threads", "requests", "locks", "usedba", "debug", "users", "idle", "reserved")
    )


@cache
def library() -> Any:
    """The C library, or None if it is another than glibc of 64 bits with all this in it (2.34)."""
    if ctypes.sizeof(_Request) != 168:
        return None
    found = ctypes.CDLL(None, use_errno=True)
    try:
        found.gnu_get_libc_version, found.aio_init, found.aio_read  # noqa: B018
        found.aio_return.restype = ctypes.c_ssize_t
    except AttributeError:
        return None
    return found


class Readers:
    """`memory` has a row a buffer, of at least `nbytes`, that one request after another fills."""

    def __init__(self, threads: int, buffers: int, nbytes: int):
        """`threads`: that read; the first Readers of a process decide."""
        self._library = library()
        settings = _Settings(threads=threads, requests=buffers, idle=1)
        self._library.aio_init(ctypes.byref(settings))
        room = whole_pages(nbytes)
        self.memory = huge_pages(buffers * room).reshape(buffers, room)
        self._addresses = [row.ctypes.data for row in self.memory]
        requests = (_Request * buffers)(*[_Request(notify=_SIGEV_NONE)] * buffers)
        self._requests = list(requests)
        self._pointers = [ctypes.addressof(request) for request in requests]
        self._errors = _errors(requests)
        self._errors[:] = EINPROGRESS  # nothing is finished
        self._waiting_for = (ctypes.c_void_p * buffers)()
        # glibc reads one piece of a descriptor at a time: each buffer has a duplicate of its own.
        self._duplicates: dict[int, int] = {}  # by buffer
        self._file_of: dict[int, int] = {}  # that the duplicate is of
        self._asked: dict[int, tuple[int, int, int]] = {}  # by buffer: offset, bytes, bytes read

    def ask(self, buffer: int, file: int, offset: int, nbytes: int) -> None:
        """Have a buffer filled with `nbytes` of a file that stays open.

        Raises:
            OSError: nothing can be asked for.
        """
        if self._file_of.get(buffer) != file:
            if buffer in self._duplicates:
                os.dup2(file, self._duplicates[buffer], inheritable=False)
            else:
                self._duplicates[buffer] = os.dup(file)
            self._file_of[buffer] = file
        self._read(buffer, offset, nbytes, 0)

    def _read(self, buffer: int, offset: int, nbytes: int, done: int) -> None:
        request, pointer = self._requests[buffer], self._pointers[buffer]
        request.file = self._duplicates[buffer]
        request.buffer = self._addresses[buffer] + done
        request.nbytes, request.offset = nbytes - done, offset + done
        request.error = 0  # not under way, should an interrupt come before it is
        self._asked[buffer] = offset, nbytes, done
        self._waiting_for[buffer] = pointer
        if self._library.aio_read(ctypes.c_void_p(pointer)):
            self._forget(buffer)
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def answers(self) -> Iterator[tuple[int, int]]:
        """Wait, and tell of buffers that have been filled, if any: which, and with how many bytes.

        Fewer than were asked for where a file ends, and -errno where it could not be read.
        """
        for buffer in self._finished():
            offset, nbytes, done = self._asked[buffer]
            pointer = ctypes.c_void_p(self._pointers[buffer])
            error = self._library.aio_error(pointer)
            count = self._library.aio_return(pointer)
            self._forget(buffer)
            if error:
                yield buffer, -error
            elif 0 < count < nbytes - done:
                try:
                    self._read(buffer, offset, nbytes, done + count)
                except OSError as failure:
                    yield buffer, -failure.errno
            else:
                yield buffer, done + count

    def _finished(self) -> list[int]:
        """Buffers of requests that are no longer under way, at least one."""
        while True:
            if finished := np.flatnonzero(self._errors != EINPROGRESS).tolist():
                return finished
            buffers = len(self._waiting_for)
            if self._library.aio_suspend(self._waiting_for, buffers, None):
                error = ctypes.get_errno()
                assert error == EINTR, os.strerror(error)

    def _forget(self, buffer: int) -> None:
        self._asked.pop(buffer, None)  # not there if an interrupt came before
        self._waiting_for[buffer] = None
        self._errors[buffer] = EINPROGRESS  # not finished a second time

    def close(self) -> None:
        """Wait for what has begun, and leave the rest."""
        for buffer in self._asked:
            self._library.aio_cancel(self._duplicates[buffer], None)
        while self._asked:
            for buffer in self._finished():
                # It waits until the library has done with the request.
                self._library.aio_error(ctypes.c_void_p(self._pointers[buffer]))
                self._forget(buffer)
        for duplicate in self._duplicates.values():
            os.close(duplicate)


def _errors(requests: Any) -> np.ndarray:
    """What aio_error() would say of each, to be looked at without a call for each: a view."""
    rows = np.frombuffer(requests, np.uint8).reshape(len(requests), -1)
    begin = _Request.error.offset
    return rows[:, begin : begin + 4].view(np.int32)[:, 0]


@contextmanager
def open_readers(threads: int, buffers: int, nbytes: int) -> Iterator[Readers]:
    """`Readers` that end with the block."""
    readers = Readers(threads, buffers, nbytes)
    try:
        yield readers
    finally:
        readers.close()
