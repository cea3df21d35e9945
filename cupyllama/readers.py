"""Processes that read files into memory which they share with this one.

Threads would hand Python on to one another for every piece, and to the thread that tokenises.
"""

import mmap
import os
import select
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from cupyllama import read_files
from cupyllama.errors import ModelError
from cupyllama.read_files import ANSWER, ASKED


class Readers:
    """`count` processes with `buffers` buffers each; `memory` has a row a buffer.

    Buffers of one process are neighbours.
    """

    def __init__(self, count: int, buffers: int, nbytes: int, files: Sequence[int]):
        """`files`: descriptors that may be asked for."""
        self._buffers, self._nbytes = buffers, nbytes
        self._shared = os.memfd_create("cupyllama")
        os.ftruncate(self._shared, count * buffers * nbytes)
        shared = mmap.mmap(self._shared, count * buffers * nbytes)
        self.memory = np.frombuffer(shared, np.uint8).reshape(count * buffers, nbytes)
        command = [sys.executable, "-I", "-S", read_files.__file__, str(self._shared)]
        self._processes: list[subprocess.Popen] = []
        self._asked: list[deque[int]] = [deque() for _ in range(count)]  # buffers, oldest first
        self._reader_of: dict[int, int] = {}
        self._poll = select.poll()
        for number in range(count):
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[self._shared, *files],
                start_new_session=True,  # Ctrl-C is for the process that has them
            )
            self._processes.append(process)
            self._reader_of[process.stdout.fileno()] = number
            self._poll.register(process.stdout, select.POLLIN)

    def ask(self, buffer: int, file: int, offset: int, nbytes: int) -> None:
        """Have a buffer filled with `nbytes` of a file.

        Raises:
            ModelError: its process has ended.
        """
        reader = buffer // self._buffers
        self._asked[reader].append(buffer)
        asked = ASKED.pack(file, offset, nbytes, buffer * self._nbytes)
        try:
            os.write(self._processes[reader].stdin.fileno(), asked)
        except BrokenPipeError as error:
            raise _ended() from error

    def answers(self) -> Iterator[tuple[int, int]]:
        """Wait, and tell of buffers that have been filled: which, and with how many bytes.

        Fewer than were asked for where a file ends, and -errno where it could not be read.

        Raises:
            ModelError: a process has ended.
        """
        for descriptor, _ in self._poll.poll():
            reader = self._reader_of[descriptor]
            found = os.read(descriptor, ANSWER.size * self._buffers)
            if len(found) % ANSWER.size or not found:
                raise _ended()
            for (nbytes,) in ANSWER.iter_unpack(found):
                yield self._asked[reader].popleft(), nbytes

    def close(self) -> None:
        """End the processes, whatever they are at. The memory stays while it is referred to."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            process.stdin.close()
            process.stdout.close()
        os.close(self._shared)


@contextmanager
def open_readers(count: int, buffers: int, nbytes: int, files: Sequence[int]) -> Iterator[Readers]:
    """`Readers` that end with the block."""
    readers = Readers(count, buffers, nbytes, files)
    try:
        yield readers
    finally:
        readers.close()


def _ended() -> ModelError:
    return ModelError("a process that reads the checkpoint has ended", "Is there memory left?")
