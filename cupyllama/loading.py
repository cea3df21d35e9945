"""The weights of a stage, from a checkpoint to the device.

Every tensor is cut into chunks, and many read them at once, each chunk to its place: a core copies
5 to 10 GB/s out of the page cache, and the bus of a GPU takes 50. What lies in the files as it is
wanted on a GPU is read by threads of the C library. All else by Python's: within a chunk, a thread
goes from piece to piece by itself, for only one thread at a time may run Python.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.checkpoint.eight_bit import quantize_rows
from cupyllama.checkpoint.fields import SCALE, Field, check_names, stage_bytes, stage_fields
from cupyllama.checkpoint.source import Checkpoint
from cupyllama.chunks import Chunk, field_chunks, open_files
from cupyllama.config import ModelConfig
from cupyllama.crew import Worker, for_each
from cupyllama.errors import ModelError
from cupyllama.families import StageWeights, family_of
from cupyllama.quantized import Quantized
from cupyllama.readers import Readers, library, open_readers

THREADS = 12
# Small enough that what a thread has just read is still in a cache when the device fetches it.
PIECE_BYTES = 4 << 20
BUFFERS = 2  # of a piece each, for every thread whose pieces go to a device
# Few enough that all threads are at work to the end, many enough that handing out chunks costs
# nothing.
PIECES_PER_CHUNK = 8

_ALIGNMENT = 512  # of an array, in bytes: as CuPy gives it
_LARGEST_ELEMENT = 4  # bytes, of all dtypes that are read or kept

Array = Any  # numpy.ndarray or cupy.ndarray: whatever `ops` works on
Arrays = dict[int | None, dict[str, Array]]  # by layer, None for the model's ends, and by name


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
    quantize: str | None = None,
    aio: bool = True,
) -> StageWeights:
    """Read the tensors of `layers` and no others, fused, to where `ops` wants them.

    Args:
        dtype: what the weights are stored as; conversion happens on the way.
        on_bytes: called in this thread with the bytes of the stage's arrays that are newly there.
        threads: that read.
        piece_bytes: how much one of them reads at a time.
        buffers: of a piece each for every thread, from which it is copied to a device.
        quantize: "fp8" or "int8" for the layers' matrices as `Quantized`: as they are stored, or
            made from what is stored, whatever `dtype` is, a few rows at a time.
        aio: whether the C library's threads may read what lies in files as a device wants it.

    Raises:
        ModelError: a tensor is missing, misshapen, unknown, unsupported or cut short.
        MemoryError: the arrays do not fit.
    """
    assert checkpoint.bands == 1  # else it is for `part_of_checkpoint`
    check_names(checkpoint, config)
    if checkpoint.quantization not in (None, quantize):
        raise ModelError(
            f"{checkpoint.directory}: the weights are {checkpoint.quantization} already",
            f"Load them as {checkpoint.quantization}.",
        )
    made_here = quantize is not None and checkpoint.quantization is None
    fields = list(stage_fields(config, layers, quantize))
    arrays = _arrays(ops, fields, dtype)
    left = stage_bytes(config, layers, dtype, quantize)
    on_host = isinstance(next(iter(arrays[layers.start].values())), np.ndarray)

    def pieces() -> int:
        # One at the end, so that all threads end together. On the host one always: what quantizing
        # takes is several times the size of a chunk.
        at_end = left < threads * PIECES_PER_CHUNK * piece_bytes
        return 1 if at_end or on_host else PIECES_PER_CHUNK

    def chunks() -> Iterator[Chunk]:
        nonlocal left
        for layer, field in fields:
            target = arrays[layer][field.name]
            if made_here and field.name.endswith(SCALE):
                continue
            if made_here and field.name + SCALE in arrays[layer]:
                target = Quantized(target, arrays[layer][field.name + SCALE])
            for chunk in field_chunks(checkpoint, field, target, piece_bytes, pieces, descriptor):
                left -= chunk.nbytes
                yield chunk

    def on_done(chunk: Chunk) -> None:
        checkpoint.count_bytes(chunk.file_bytes)
        on_bytes(chunk.nbytes)

    def on_copied(count: int) -> None:
        checkpoint.count_bytes(count)
        on_bytes(count)

    with open_files() as descriptor:
        todo: Iterable[Chunk] = chunks()
        if on_host:
            workers = nullcontext(lambda: nullcontext(_put_on_host))
        else:
            if aio and library() is not None:
                count = min(threads * buffers, -(-left // piece_bytes))
                with open_readers(threads, count, min(piece_bytes, left)) as readers:
                    todo = _copy_files(todo, readers, on_copied)
            workers = _device_writers(fields, threads, buffers, piece_bytes, made_here)
        with workers as worker:
            for_each(todo, worker, threads, on_done)
    ends = arrays.get(None, {})
    if config.tie_word_embeddings and layers.stop == config.num_hidden_layers:
        ends["lm_head"] = ends["embed_tokens"]
        if layers.start > 0:
            del ends["embed_tokens"]
    model = family_of(config).model
    return model.StageWeights(
        [model.LayerWeights(**_paired(arrays[layer])) for layer in layers], **ends
    )


def _arrays(ops: ModuleType, fields: list[tuple[int | None, Field]], dtype: np.dtype) -> Arrays:
    """An array for each field, all of them views of one allocation.

    Calls of the driver for each array would go on while copies want the driver.
    """
    sizes = [field.nbytes(dtype) for _, field in fields]
    places = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
    block = ops.empty((places[-1],), np.dtype(np.uint8))
    arrays: Arrays = {}
    for (layer, field), place, size in zip(fields, places[:-1], sizes, strict=True):
        array = block[place : place + size].view(field.array_dtype(dtype)).reshape(field.shape)
        arrays.setdefault(layer, {})[field.name] = array
    return arrays


def _paired(arrays: dict[str, Array]) -> dict[str, Array | Quantized]:
    """The arrays of a layer, each matrix that has a scale together with it."""
    return {
        name: Quantized(array, arrays[name + SCALE]) if name + SCALE in arrays else array
        for name, array in arrays.items()
        if not name.endswith(SCALE)
    }


def _put_on_host(chunk: Chunk) -> Iterator[None]:
    out = chunk.target
    if isinstance(chunk.target, Quantized):
        out = np.empty(prod(chunk.target.shape), chunk.dtype)
    for begin in range(0, len(out), chunk.step):
        chunk.fill(out[begin : begin + chunk.step], begin)
        yield
    if isinstance(chunk.target, Quantized):
        quantize_rows(out.reshape(chunk.target.shape), chunk.target)


def _copy_files(
    chunks: Iterator[Chunk], readers: Readers, on_copied: Callable[[int], None]
) -> list[Chunk]:
    """Copy what lies in files to the device; returns the other chunks."""
    from cupyllama.ops.transfer import copy_extents

    others: list[Chunk] = []

    def lying() -> Iterator[Chunk]:
        for chunk in chunks:
            if chunk.extent is None:
                others.append(chunk)
            else:
                yield chunk

    copy_extents(lying(), readers, on_copied)
    return others


def _device_writers(
    fields: list[tuple[int | None, Field]],
    threads: int,
    buffers: int,
    piece_bytes: int,
    quantizing: bool,
) -> AbstractContextManager[Worker[Chunk]]:
    """What copies chunks to the device, from buffers no larger than the model needs them."""
    from cupyllama.ops.transfer import device_writers

    matrices = [shape for _, field in fields for shape in field.shapes]
    largest = _LARGEST_ELEMENT * max(map(prod, matrices))
    buffer = min(largest, max(piece_bytes, _LARGEST_ELEMENT))
    row = _LARGEST_ELEMENT * max(shape[-1] for shape in matrices)
    staging = min(largest, max(PIECES_PER_CHUNK * piece_bytes, row)) if quantizing else 0
    return device_writers(threads, buffers, buffer, staging)
