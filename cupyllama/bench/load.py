"""`cupyllama bench load`: a checkpoint in the page cache to the GPU, beside a plain pinned copy."""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.bench.measure import result
from cupyllama.bench.shapes import model_config
from cupyllama.bench.table import as_table
from cupyllama.checkpoint.fields import stage_bytes, stage_fields
from cupyllama.checkpoint.source import DTYPES, Checkpoint, open_checkpoint
from cupyllama.config import ModelConfig, load_config
from cupyllama.errors import DeviceError, OutputError
from cupyllama.loading import load_stage
from cupyllama.parallel.devices import Device, choose_dtype, storage_dtype

PINNED_BYTES = 256 << 20
_READ_BYTES = 16 << 20


def measure_load(
    device: Device, model: Path | None, shape: str, folder: Path | None, dtype: str, repeats: int
) -> dict[str, Any]:
    """Load all layers, in turn with copies of as many bytes from one pinned buffer.

    A load begins with an empty memory pool, so it pays for the allocation of what it fills, as in
    a run of the engine; the copy does not.

    Args:
        model: a checkpoint; None: one of `shape` with random values, written to `folder`.

    Raises:
        DeviceError: the weights do not fit.
        OutputError: the checkpoint cannot be written.
    """
    config = model_config(shape) if model is None else load_config(model)
    storage = storage_dtype(choose_dtype(dtype, dtype, device))
    layers = range(config.num_hidden_layers)
    nbytes, free = stage_bytes(config, layers, storage), device.free_bytes()
    if nbytes + 2 * PINNED_BYTES > free:
        raise DeviceError(
            f"{nbytes / 1e9:.1f} GB of weights do not fit the {free / 1e9:.1f} GB that are free "
            f"on {device.name}",
            "Give a smaller model.",
        )
    with _checkpoint(model, config, storage, folder) as directory:
        checkpoint = open_checkpoint(directory)
        _warm(checkpoint)
        copies: list[float] = []
        loads: list[float] = []
        pinned_rate(nbytes)  # warms the card
        for _ in range(repeats):
            copies.append(pinned_rate(nbytes))
            loads.append(load_rate(checkpoint, config, storage, device.ops, nbytes))
    copy, load = statistics.median(copies), statistics.median(loads)
    return result(
        "load",
        device,
        shape=shape if model is None else str(model),
        dtype=dtype,
        bytes=nbytes,
        pinned_copy_bytes_per_second=copies,
        runs=[{"bytes_per_second": loads, "of_pinned_copy": load / copy}],
    )


def load_rate(
    checkpoint: Checkpoint, config: ModelConfig, dtype: np.dtype, ops: Any, nbytes: int
) -> float:
    """Bytes a second of `load_stage`."""
    _empty_pool()
    begin = time.perf_counter()
    weights = load_stage(checkpoint, config, range(config.num_hidden_layers), dtype, ops)
    ops.synchronize()
    seconds = time.perf_counter() - begin
    del weights
    return nbytes / seconds


def pinned_rate(nbytes: int) -> float:
    """Bytes a second of a plain copy from one pinned buffer, again and again."""
    import cupy
    import cupyx

    pinned, target = cupyx.empty_pinned(PINNED_BYTES, np.uint8), cupy.empty(PINNED_BYTES, np.uint8)
    pinned[:] = 1  # pages that are there
    stream, times = cupy.cuda.get_current_stream(), -(-nbytes // PINNED_BYTES)
    stream.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        target.data.copy_from_host_async(pinned.ctypes.data, PINNED_BYTES)
    stream.synchronize()
    return times * PINNED_BYTES / (time.perf_counter() - begin)


def write_checkpoint(directory: Path, config: ModelConfig, dtype: np.dtype) -> None:
    """One model.safetensors of random finite numbers.

    Raises:
        OutputError: it cannot be written.
    """
    fields = [field for _, field in stage_fields(config, range(config.num_hidden_layers))]
    shapes = {name: shape for f in fields for name, shape in zip(f.parts, f.shapes, strict=True)}
    saved = {numpy: name for name, numpy in DTYPES.items()}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": saved, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # An odd length, so that every piece of the file differs from the next.
    bits = np.random.default_rng(0).integers(0, 1 << 16, (32 << 20) + 1009, np.uint16)
    bits &= 0xBFFF  # without its highest bit no exponent says infinite, in any of the dtypes
    random = memoryview(bits.view(np.uint8))
    try:
        with open(directory / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for begin in range(0, end, len(random)):
                file.write(random[: end - begin])
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be written: {error.strerror}",
            f"{end / 1e9:.1f} GB are needed. Give another --folder, or a --model that is there.",
        ) from error


def load_table(measured: dict[str, Any]) -> str:
    """One line."""
    (run,), gigabytes = measured["runs"], measured["bytes"] / 1e9
    copies, loads = measured["pinned_copy_bytes_per_second"], run["bytes_per_second"]
    headers = ["checkpoint", "dtype", "GB", "s", "GB/s", "pinned copy GB/s", "of the copy"]
    rate = statistics.median(loads) / 1e9
    line = [measured["shape"], measured["dtype"], f"{gigabytes:.2f}", f"{gigabytes / rate:.3f}"]
    line += [f"{rate:.1f}", f"{statistics.median(copies) / 1e9:.1f}"]
    return as_table(headers, [[*line, f"{run['of_pinned_copy']:.2f}"]], left=2)


@contextmanager
def _checkpoint(
    model: Path | None, config: ModelConfig, dtype: np.dtype, folder: Path | None
) -> Iterator[Path]:
    """The one given, or one that is there until the end of the block."""
    if model is not None:
        yield model
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix="cupyllama-load-", dir=folder)
    except OSError as error:
        raise OutputError(
            f"{folder}: {error.strerror}", "Give a --folder that is there."
        ) from error
    with temporary as directory:
        write_checkpoint(Path(directory), config, dtype)
        yield Path(directory)


def _warm(checkpoint: Checkpoint) -> None:
    """Read every file once: what follows finds it in the page cache."""
    for path in sorted(
        {run.path for tensor in checkpoint.tensors.values() for run in tensor.origins}
    ):
        with open(path, "rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                pass


def _empty_pool() -> None:
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.cuda.Device().synchronize()
