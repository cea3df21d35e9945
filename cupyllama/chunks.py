"""The tensors of a checkpoint cut into chunks, each with what reads it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.checkpoint.fields import Field
from cupyllama.checkpoint.slices import StoredColumns
from cupyllama.checkpoint.source import (
    INCOMPLETE,
    QUANTIZED,
    Checkpoint,
    StoredTensor,
    numpy_dtype,
)
from cupyllama.errors import ModelError
from cupyllama.quantized import Quantized

Array = Any  # numpy.ndarray or cupy.ndarray
# Writes the values from an index on to a flat host array of any float dtype.
Fill = Callable[[np.ndarray, int], None]


@dataclass(frozen=True)
class Extent:
    """Bytes that lie in a file one after another, as they are wanted."""

    file: int
    offset: int
    stored: StoredTensor  # of which they are

    def check(self, wanted: int, found: int) -> None:
        """Raises ModelError where fewer bytes were found than are wanted, or -errno."""
        if found < 0:
            raise ModelError(f"{self.stored.path}: {os.strerror(-found)}")
        if found < wanted:
            raise ModelError(f"{self.stored.path}: ends inside {self.stored.name}", INCOMPLETE)


@dataclass(frozen=True)
class Chunk:
    """A run of elements of an array, or whole rows to be quantized, and what reads them."""

    target: Array | Quantized  # (count,), or (rows, columns)
    dtype: np.dtype  # in which `fill` writes: that of the array, or the one that is stored
    step: int  # how many elements `fill` is to write at a time
    fill: Fill
    file_bytes: int  # that `fill` reads and does not count itself
    extent: Extent | None = None  # where that is all there is to it

    @property
    def nbytes(self) -> int:
        """Bytes of the target."""
        if isinstance(self.target, Quantized):
            return self.target.values.nbytes + self.target.scale.nbytes
        return self.target.nbytes


def field_chunks(
    checkpoint: Checkpoint,
    field: Field,
    target: Array | Quantized,
    piece_bytes: int,
    pieces: Callable[[], int],
    descriptor: Callable[[Path], int],
) -> Iterator[Chunk]:
    """The parts of a field, in chunks; whole where a part must be put together.

    Args:
        target: of the field's shape; rows are to be quantized where it is `Quantized`.
        pieces: how many pieces the next chunk may have.
    """
    first = 0
    for name, shape in zip(field.parts, field.shapes, strict=True):
        last, stored = first + shape[0], _lying(checkpoint, name)
        file = None if stored is None else descriptor(stored.path)
        if isinstance(target, Quantized):
            part = _rows(target, first, last)
            yield from _row_chunks(checkpoint, name, part, piece_bytes, pieces, file)
        elif stored is None:
            part = target[first:last]
            whole = _tensor(checkpoint, name, 0, shape)
            yield Chunk(part.reshape(-1), part.dtype, part.size, whole, 0)
        else:
            flat = target[first:last].reshape(-1)
            dtype = flat.dtype if field.dtype in QUANTIZED else numpy_dtype(stored)
            yield from _flat_chunks(stored, flat, dtype, piece_bytes, pieces, file)
        first = last


def _lying(checkpoint: Checkpoint, name: str) -> StoredTensor | StoredColumns | None:
    """Where the tensor lies in a file, if nothing must be done to put it together."""
    tensor = checkpoint.tensors[name]
    return tensor if isinstance(tensor, StoredColumns) else checkpoint.locate(name)


def _flat_chunks(
    stored: StoredTensor | StoredColumns,
    flat: Array,
    dtype: np.dtype,
    piece_bytes: int,
    pieces: Callable[[], int],
    file: int,
) -> Iterator[Chunk]:
    """Elements of an array, stored as `dtype`, anywhere cut."""
    step = max(1, piece_bytes // max(dtype.itemsize, flat.itemsize))
    begin = 0
    while begin < len(flat):
        out = flat[begin : begin + step * pieces()]
        fill = _run(file, stored, dtype, begin)
        extent = None
        if isinstance(stored, StoredTensor) and dtype == flat.dtype:
            extent = Extent(file, stored.offset + begin * dtype.itemsize, stored)
        nbytes = len(out) * dtype.itemsize
        yield Chunk(out, flat.dtype, min(step, len(out)), fill, nbytes, extent)
        begin += len(out)


def _row_chunks(
    checkpoint: Checkpoint,
    name: str,
    matrix: Quantized,
    piece_bytes: int,
    pieces: Callable[[], int],
    file: int | None,
) -> Iterator[Chunk]:
    """Whole rows, as the scale of a row wants all of it."""
    tensor = checkpoint.tensors[name]
    dtype, columns = numpy_dtype(tensor), matrix.shape[1]
    step = max(1, piece_bytes // dtype.itemsize)
    begin = 0
    while begin < len(matrix):
        rows = _rows(matrix, begin, begin + max(1, step * pieces() // columns))
        count = len(rows) * columns
        if file is None:
            fill = _tensor(checkpoint, name, begin, rows.shape)
            yield Chunk(rows, dtype, count, fill, 0)
        else:
            fill = _run(file, tensor, dtype, begin * columns)
            yield Chunk(rows, dtype, min(step, count), fill, count * dtype.itemsize)
        begin += len(rows)


def _rows(matrix: Quantized, first: int, last: int) -> Quantized:
    return Quantized(matrix.values[first:last], matrix.scale[first:last])


def _tensor(checkpoint: Checkpoint, name: str, first: int, shape: tuple[int, ...]) -> Fill:
    """What reads rows of a tensor that does not lie in a file as it is wanted, in one step."""
    return lambda out, begin: checkpoint.read_rows(name, first, out.reshape(shape))


def _run(file: int, stored: StoredTensor | StoredColumns, dtype: np.dtype, first: int) -> Fill:
    """What reads as many elements as it is given room for, counting from element `first`."""

    def read(out: np.ndarray, begin: int) -> None:
        if isinstance(stored, StoredTensor):
            _read(file, stored.offset + begin * dtype.itemsize, out, stored)
            return
        done = 0
        for offset, count in stored.runs(begin, len(out)):
            _read(file, offset, out[done : done + count], stored)
            done += count

    def fill(out: np.ndarray, begin: int) -> None:
        if out.dtype == dtype:
            read(out, first + begin)
            return
        values = np.empty(out.shape, dtype)
        read(values, first + begin)
        with np.errstate(over="ignore"):  # beyond float16: scoring finds the infinity
            np.copyto(out, values, casting="unsafe")

    return fill


def _read(file: int, offset: int, out: np.ndarray, stored: StoredTensor | StoredColumns) -> None:
    view, done = out.view(np.uint8), 0
    try:
        while done < len(view):
            count = os.preadv(file, [view[done:]], offset + done)
            if not count:
                raise ModelError(f"{stored.path}: ends inside {stored.name}", INCOMPLETE)
            done += count
    except OSError as error:
        raise ModelError(f"{stored.path}: {error.strerror}") from error


@contextmanager
def open_files() -> Iterator[Callable[[Path], int]]:
    """A function from a path to its descriptor, the same every time; all are closed at the end."""
    opened: dict[Path, int] = {}

    def descriptor(path: Path) -> int:
        if path not in opened:
            try:
                opened[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{path}: {error.strerror}") from error
        return opened[path]

    try:
        yield descriptor
    finally:
        for file in opened.values():
            os.close(file)
