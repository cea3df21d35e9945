"""The weights of a stage, from a checkpoint to the device.

Every tensor is cut into chunks, and threads read them all at once, each chunk to its place: a core
copies 5 to 10 GB/s out of the page cache, and the bus of a GPU takes 50. Within a chunk, a thread
goes from piece to piece by itself: only one thread at a time may run Python, and what all of them
do for a piece is to take little of the 40 µs in which the bus takes it.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from cupyllama.checkpoint.llama import Field, check_names, stage_fields
from cupyllama.checkpoint.source import INCOMPLETE, Checkpoint, StoredTensor, numpy_dtype
from cupyllama.config import ModelConfig
from cupyllama.errors import ModelError
from cupyllama.model.llama import LayerWeights, StageWeights

THREADS = 14
# Small enough that what a thread has just read is still in a cache when the device fetches it.
PIECE_BYTES = 4 << 20
BUFFERS = 2  # of a piece each, for every thread that copies to a device
# Few enough that the threads end together, many enough that handing out chunks costs nothing.
PIECES_PER_CHUNK = 8

Job = TypeVar("Job")
Array = Any  # numpy.ndarray or cupy.ndarray: whatever `ops` works on
# Writes the values from an index on to a flat host array of any float dtype.
Fill = Callable[[np.ndarray, int], None]
Worker = Callable[[], AbstractContextManager[Callable[[Job], Iterable[Any]]]]


@dataclass(frozen=True)
class Chunk:
    """Elements first:first + count of the flattened target, and what reads them."""

    target: Array
    first: int
    count: int
    step: int  # how many of them `fill` is to read at a time
    fill: Fill
    file_bytes: int  # that `fill` reads and does not count itself


def load_stage(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layers: range,
    dtype: np.dtype,
    ops: ModuleType,
    on_bytes: Callable[[int], None] = lambda count: None,
    threads: int = THREADS,
    piece_bytes: int = PIECE_BYTES,
    buffers: int = BUFFERS,
    blocking: bool = False,
) -> StageWeights:
    """Read the tensors of `layers` and no others, fused, to where `ops` wants them.

    Args:
        dtype: what the weights are stored as; conversion happens on the way.
        on_bytes: called in this thread with the bytes of the stage's arrays that are newly there.
        piece_bytes: how much a thread reads at a time.
        buffers, blocking: of the copies to a device; see `DeviceWriter`.

    Raises:
        ModelError: a tensor is missing, misshapen, unknown, unsupported or cut short.
        MemoryError: the arrays do not fit.
    """
    check_names(checkpoint, config)
    fields = list(stage_fields(config, layers))
    ends: dict[str, Array] = {}
    by_layer: dict[int, dict[str, Array]] = {layer: {} for layer in layers}

    def chunks() -> Iterator[Chunk]:
        # An array is allocated while the threads read what belongs to those before it.
        for layer, field in fields:
            target = ops.empty(field.shape, dtype)
            (ends if layer is None else by_layer[layer])[field.name] = target
            yield from _field_chunks(checkpoint, field, target, piece_bytes, descriptor)

    def on_done(chunk: Chunk) -> None:
        checkpoint.count_bytes(chunk.file_bytes)
        on_bytes(chunk.count * dtype.itemsize)

    parts = (prod(shape) for _, field in fields for shape in field.shapes)
    largest = min(max(parts, default=0) * dtype.itemsize, max(piece_bytes, dtype.itemsize))
    workers = _workers(ops, dtype, largest, buffers, blocking)
    with _open_files() as descriptor:
        for_each(chunks(), workers, threads, on_done)
    if config.tie_word_embeddings and layers.stop == config.num_hidden_layers:
        ends["lm_head"] = ends["embed_tokens"]
        if layers.start > 0:
            del ends["embed_tokens"]
    return StageWeights([LayerWeights(**by_layer[layer]) for layer in layers], **ends)


def for_each(
    jobs: Iterable[Job],
    worker: Worker[Job],
    threads: int,
    on_done: Callable[[Job], None] = lambda job: None,
) -> None:
    """Have every job done in one of up to `threads` threads.

    `jobs` is iterated over, and on_done called, in the thread that calls. Whatever is raised
    anywhere ends all threads, each after the step it is at, before it is raised here.

    Args:
        worker: entered in every thread; gives what does a job, in as many steps as it yields.
    """
    todo: SimpleQueue[Job | None] = SimpleQueue()
    done: SimpleQueue[Job | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            with worker() as do:
                while (job := todo.get()) is not None and not stop.is_set():
                    for _ in do(job):
                        if stop.is_set():
                            break
                    else:
                        done.put(job)
        except BaseException as error:
            stop.set()
            done.put(error)
        else:
            done.put(None)

    crew: list[threading.Thread] = []
    try:
        for job in jobs:
            if stop.is_set():
                break
            todo.put(job)
            if len(crew) < threads:
                # A daemon: a read that hangs must not keep alive a process that was told to end.
                crew.append(threading.Thread(target=work, name="read", daemon=True))
                crew[-1].start()
        _send_home(todo, crew)
        working = len(crew)
        while working:
            answer = done.get()
            if answer is None:
                working -= 1
            elif isinstance(answer, BaseException):
                try:
                    raise answer
                finally:
                    del answer  # else it and this frame, with every array, keep each other alive
            else:
                on_done(answer)
    finally:
        stop.set()
        _send_home(todo, crew)
        for thread in crew:
            if thread.is_alive():  # not so if the interrupt came before it was started
                thread.join()


def _send_home(todo: SimpleQueue, crew: list[threading.Thread]) -> None:
    for _ in crew:
        todo.put(None)


def _field_chunks(
    checkpoint: Checkpoint,
    field: Field,
    target: Array,
    piece_bytes: int,
    descriptor: Callable[[Path], int],
) -> Iterator[Chunk]:
    """The parts of a field, in chunks; whole where a part must be put together."""
    first = 0
    for name, shape in zip(field.parts, field.shapes, strict=True):
        count, stored = prod(shape), checkpoint.locate(name)
        if stored is None:
            yield Chunk(target, first, count, count, _whole(checkpoint, name, shape), 0)
        else:
            dtype, file = numpy_dtype(stored), descriptor(stored.path)
            step = max(1, piece_bytes // max(dtype.itemsize, target.itemsize))
            for begin in range(0, count, step * PIECES_PER_CHUNK):
                size = min(step * PIECES_PER_CHUNK, count - begin)
                fill, nbytes = _run(file, stored, dtype, begin), size * dtype.itemsize
                yield Chunk(target, first + begin, size, min(step, size), fill, nbytes)
        first += count


def _whole(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Fill:
    """What reads a tensor that does not lie in a file as it is wanted, in one step."""
    return lambda out, begin: checkpoint.read_into(name, out.reshape(shape))


def _run(file: int, stored: StoredTensor, dtype: np.dtype, first: int) -> Fill:
    """What reads as many elements as it is given room for, counting from element `first`."""

    def fill(out: np.ndarray, begin: int) -> None:
        offset = stored.offset + (first + begin) * dtype.itemsize
        if out.dtype == dtype:
            _read(file, offset, out, stored)
            return
        values = np.empty(out.shape, dtype)
        _read(file, offset, values, stored)
        with np.errstate(over="ignore"):  # beyond float16: scoring finds the infinity
            np.copyto(out, values, casting="unsafe")

    return fill


def _read(file: int, offset: int, out: np.ndarray, stored: StoredTensor) -> None:
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
def _open_files() -> Iterator[Callable[[Path], int]]:
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


def _workers(
    ops: ModuleType, dtype: np.dtype, nbytes: int, buffers: int, blocking: bool
) -> Worker[Chunk]:
    """What puts chunks to where `ops` has its arrays, in pieces of up to `nbytes`."""
    if isinstance(ops.empty((0,), dtype), np.ndarray):
        return lambda: nullcontext(_put_on_host)
    from cupyllama.ops.transfer import device_writers

    open_writer = device_writers(nbytes, buffers, blocking)

    @contextmanager
    def worker() -> Iterator[Callable[[Chunk], Iterator[None]]]:
        with open_writer() as write:
            yield lambda chunk: write(
                chunk.target, chunk.first, chunk.count, chunk.step, chunk.fill
            )

    return worker


def _put_on_host(chunk: Chunk) -> Iterator[None]:
    out = chunk.target.reshape(-1)[chunk.first : chunk.first + chunk.count]
    for begin in range(0, chunk.count, chunk.step):
        chunk.fill(out[begin : begin + chunk.step], begin)
        yield
