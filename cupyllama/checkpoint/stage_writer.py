"""One stage file, streamed: what keeps its dtype is copied by the kernel, from file to file; the
rest is read, converted or quantized, and written in a few fixed buffers. All of it is hashed
meanwhile.
"""

import errno
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from cupyllama.checkpoint.eight_bit import quantized_rows
from cupyllama.checkpoint.fields import KINDS, SCALE, Field
from cupyllama.checkpoint.source import DTYPES, INCOMPLETE, QUANTIZED, Checkpoint, StoredTensor
from cupyllama.errors import ModelError, OutputError

CHUNK_BYTES = 1 << 20  # small enough to be hashed and written out of a cache
_BUFFERS = 16
_ALIGNMENT = 4096  # of the data section: a page, and what direct I/O asks for
_FLUSH_BYTES = 256 << 20  # written between two requests to flush
_COPY_BYTES = 64 << 20  # of a file copied to a file between two signs of progress
# A kernel or a file system that cannot copy from file to file.
_CANNOT_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class PlannedArray:
    """An array of a stage file, and the tensors to stack for it."""

    name: str
    field: Field
    dtype: str  # as safetensors spells it

    @property
    def nbytes(self) -> int:
        return prod(self.field.shape) * (DTYPES | QUANTIZED)[self.dtype].itemsize


def header_bytes(arrays: Sequence[PlannedArray], metadata: dict[str, str]) -> bytes:
    """The safetensors header, padded with spaces so that the data begins aligned."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for array in arrays:
        begin, end = end, end + array.nbytes
        header[array.name] = {
            "dtype": array.dtype,
            "shape": list(array.field.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_stage(
    path: Path,
    checkpoint: Checkpoint,
    arrays: Sequence[PlannedArray],
    metadata: dict[str, str],
    on_bytes: Callable[[int], None],
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[int, str]:
    """Write the file under another name, flush it to the disk and rename it.

    Memory is that of a few chunks, whatever the size of the arrays: `chunk_bytes`, or one row if
    that is larger; where matrices are quantized, of a few for every core, and their scales.

    Returns:
        Its size and SHA-256.

    Raises:
        ModelError: a source tensor cannot be read.
        OutputError: the disk is full, or refuses the file.
    """
    row_bytes = max(array.nbytes // array.field.shape[0] for array in arrays)
    header = header_bytes(arrays, metadata)
    unfinished = path.with_name(path.name + ".writing")
    try:
        with open(unfinished, "wb", buffering=0) as file:
            with _Pump(file, max(chunk_bytes, row_bytes), path, on_bytes) as pump:
                pump.send_bytes(np.frombuffer(header, np.uint8))
                _send_arrays(checkpoint, arrays, pump)
                nbytes, digest = pump.finish()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    return nbytes, digest


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> OutputError:
    """What to say of a write that failed."""
    return OutputError(
        f"{path}: cannot be written: {error.strerror or error}",
        "Mend that (is there space left on the disk?) and give the same command again: it goes on "
        "behind the last file that was finished.",
    )


def _send_arrays(checkpoint: Checkpoint, arrays: Sequence[PlannedArray], pump: "_Pump") -> None:
    scales: dict[str, np.ndarray] = {}  # of matrices that were quantized here: they follow later
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        for array in arrays:
            if array.name in scales:
                pump.send_bytes(scales.pop(array.name).view(np.uint8))
            elif array.dtype in QUANTIZED and checkpoint.quantization is None:
                found = scales[array.name + SCALE] = np.empty(array.field.shape[0], np.float32)
                kind, row = KINDS[array.dtype], 0
                for part in array.field.parts:
                    for block in quantized_rows(checkpoint, part, kind, pump.size, pool, cores):
                        pump.send_bytes(block.values.reshape(-1).view(np.uint8))
                        found[row : row + len(block)] = block.scale
                        row += len(block)
            else:
                _copy_array(checkpoint, array, pump)


def _copy_array(checkpoint: Checkpoint, array: PlannedArray, pump: "_Pump") -> None:
    """Send each part in turn: as it lies in its file, or as many rows as a buffer holds."""
    for name, shape in zip(array.field.parts, array.field.shapes, strict=True):
        stored = checkpoint.locate(name)
        if stored is not None and stored.dtype == array.dtype:
            pump.copy(stored)
            checkpoint.count_bytes(stored.nbytes)
            continue
        dtype = (DTYPES | QUANTIZED)[array.dtype]
        row = prod(shape[1:]) * dtype.itemsize
        step = pump.size // row
        for first in range(0, shape[0], step):
            rows = min(step, shape[0] - first)
            out = pump.buffer(rows * row).view(dtype).reshape(rows, *shape[1:])
            checkpoint.read_rows(name, first, out)
            pump.send(rows * row)


class _Pump:
    """Hands buffers to be filled, and lets threads hash and write them meanwhile, in order.

    A third thread asks the kernel to flush what is written, so that the disk is at work from the
    beginning and little is left to wait for at the end.
    """

    def __init__(self, file, size: int, path: Path, on_bytes: Callable[[int], None]):
        self.size = size
        self._file, self._path, self._on_bytes = file, path, on_bytes
        self._free = [np.empty(size, np.uint8) for _ in range(_BUFFERS)]
        self._busy: deque[tuple[np.ndarray | None, int, list[Future]]] = deque()
        self._sources: dict[Path, int] = {}  # descriptors
        self._sha = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1) for _ in range(3)]
        self._flushing: Future | None = None
        self._unflushed = 0
        self._sent = 0

    def __enter__(self) -> "_Pump":
        return self

    def __exit__(self, *_) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)
        for descriptor in self._sources.values():
            os.close(descriptor)

    def buffer(self, nbytes: int) -> np.ndarray:
        """(nbytes,) uint8 to be filled, then sent."""
        while not self._free:
            self._reap()
        return self._free[-1][:nbytes]

    def send(self, nbytes: int) -> None:
        """Hash and write the buffer that was handed out last."""
        buffer = self._free.pop()
        view = memoryview(buffer)[:nbytes]
        hasher, writer, _ = self._threads
        jobs = [writer.submit(self._write, view), hasher.submit(self._sha.update, view)]
        self._busy.append((buffer, nbytes, jobs))

    def send_bytes(self, content: np.ndarray) -> None:
        """Copy bytes to as many buffers as they take."""
        for begin in range(0, len(content), self.size):
            piece = content[begin : begin + self.size]
            self.buffer(len(piece))[:] = piece
            self.send(len(piece))

    def copy(self, stored: StoredTensor) -> None:
        """Hash and write the bytes of a tensor as they lie in its file."""
        if stored.path not in self._sources:
            try:
                self._sources[stored.path] = os.open(stored.path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{stored.path}: {error.strerror}") from error
        source = self._sources[stored.path]
        hasher, writer, _ = self._threads
        for begin in range(0, stored.nbytes, _COPY_BYTES):
            job = (stored, source, begin, min(_COPY_BYTES, stored.nbytes - begin))
            jobs = [writer.submit(self._write_from, *job), hasher.submit(self._hash_from, *job)]
            self._busy.append((None, job[-1], jobs))
            if len(self._busy) > _BUFFERS:
                self._reap()

    def finish(self) -> tuple[int, str]:
        """Size and SHA-256 of all that was sent, once it is written."""
        while self._busy:
            self._reap()
        if self._flushing is not None:
            self._flushing.result()
        return self._sent, self._sha.hexdigest()

    def _reap(self) -> None:
        buffer, nbytes, jobs = self._busy.popleft()
        for job in jobs:
            job.result()
        if buffer is not None:
            self._free.append(buffer)
        self._sent += nbytes
        self._on_bytes(nbytes)
        self._unflushed += nbytes
        if self._unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._flushing = self._threads[2].submit(os.fdatasync, self._file.fileno())
            self._unflushed = 0

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]

    def _write_from(self, stored: StoredTensor, source: int, begin: int, nbytes: int) -> None:
        offset, end = stored.offset + begin, stored.offset + begin + nbytes
        try:
            while offset < end:
                count = os.copy_file_range(source, self._file.fileno(), end - offset, offset)
                if not count:
                    raise ModelError(f"{stored.path}: ends inside {stored.name}", INCOMPLETE)
                offset += count
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT_COPY:
                raise
            for piece in _pieces(stored, source, offset, end):
                self._write(piece)

    def _hash_from(self, stored: StoredTensor, source: int, begin: int, nbytes: int) -> None:
        offset = stored.offset + begin
        for piece in _pieces(stored, source, offset, offset + nbytes):
            self._sha.update(piece)


def _pieces(stored: StoredTensor, source: int, offset: int, end: int) -> Iterator[memoryview]:
    """The bytes of a file from `offset` to `end`, each piece until the next is asked for."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, end - offset)))
    while offset < end:
        count = os.preadv(source, [buffer[: end - offset]], offset)
        if not count:
            raise ModelError(f"{stored.path}: ends inside {stored.name}", INCOMPLETE)
        offset += count
        yield buffer[:count]
