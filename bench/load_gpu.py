"""How fast a checkpoint in the page cache gets to the GPU, beside a plain pinned copy.

    python bench/load_gpu.py --folder /tmp --layers 32 --json out.json

A synthetic checkpoint of a published shape (LLaMA-7B in float16: 13.5 GB) is written, read once to
warm the page cache, and loaded with several sizes of pieces and buffers a thread, by aio's threads
or by several numbers of Python's, in turn with copies of as many bytes from one pinned buffer. A
load begins with an empty memory pool, so it pays for the allocation of what it fills and of its
pinned buffers, as in a run of the engine; the copy does not. With --quantize the bytes are still
those of the files: they cross the bus, and are quantized on the device.
"""

import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from itertools import product
from math import prod
from pathlib import Path

import click
import cupy
import cupyx
import numpy as np
from cupy.cuda import runtime
from one_line import one_line

from cupyllama.bench.shapes import SHAPES, model_config
from cupyllama.checkpoint.eight_bit import quantize_rows
from cupyllama.checkpoint.fields import stage_bytes, stage_fields
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.checkpoint.source import DTYPES, numpy_dtype
from cupyllama.config import ModelConfig
from cupyllama.crew import Worker, for_each
from cupyllama.loading import BUFFERS, PIECE_BYTES, THREADS, load_stage
from cupyllama.model.llama import StageWeights
from cupyllama.ops import cuda
from cupyllama.ops.transfer import DeviceWriter, device_writers
from cupyllama.parallel.devices import choose_device, storage_dtype
from cupyllama.provenance import versions
from cupyllama.quantized import Quantized

PINNED_BYTES = 256 << 20
CLEARING_SECONDS = 0.5


@dataclass(frozen=True)
class Setting:
    """What is asked of load_stage."""

    by: str  # "aio" or "threads" of Python, that read
    threads: int
    piece_bytes: int
    buffers: int

    def __str__(self) -> str:
        return (
            f"{self.by:7} threads={self.threads:2}, piece={self.piece_bytes >> 10:5} KiB, "
            f"buffers={self.buffers}"
        )

    def arguments(self) -> dict[str, int]:
        """Of load_stage."""
        arguments = asdict(self)
        arguments["aio"] = arguments.pop("by") == "aio"
        return arguments


def write_checkpoint(directory: Path, config: ModelConfig, dtype: np.dtype, files: int) -> None:
    """Tensors of random finite numbers in `files` files and their index."""
    fields = [field for _, field in stage_fields(config, range(config.num_hidden_layers))]
    shapes = {name: shape for f in fields for name, shape in zip(f.parts, f.shapes, strict=True)}
    # An odd length, so that every chunk of a file differs from the next.
    bits = np.random.default_rng(0).integers(0, 1 << 16, (32 << 20) + 1009, np.uint16)
    bits &= 0xBFFF  # without its highest bit no exponent says infinite, in float16 and bfloat16
    random, weight_map = bits.tobytes(), {}
    for number, names in enumerate(np.array_split(list(shapes), files)):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        write_file(directory / file, {name: shapes[name] for name in names.tolist()}, dtype, random)
        weight_map |= dict.fromkeys(names.tolist(), file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_file(path: Path, shapes: dict[str, tuple], dtype: np.dtype, random: bytes) -> None:
    """One safetensors file, its data `random` again and again."""
    name_of = {numpy: name for name, numpy in DTYPES.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(random)):
            file.write(memoryview(random)[: end - begin])


def read_rate(paths: list[Path], threads: int, piece_bytes: int) -> float:
    """Bytes a second that threads read into a small buffer of their own, for no further use."""
    opened = [os.open(path, os.O_RDONLY) for path in paths]
    sizes = [path.stat().st_size for path in paths]

    def jobs():
        for file, size in zip(opened, sizes, strict=True):
            yield from ((file, offset) for offset in range(0, size, piece_bytes))

    def worker():
        buffer = bytearray(piece_bytes)
        return nullcontext(lambda job: [os.preadv(job[0], [buffer], job[1])])

    begin = time.perf_counter()
    for_each(jobs(), worker, threads)
    seconds = time.perf_counter() - begin
    for file in opened:
        os.close(file)
    return sum(sizes) / seconds


def pinned_rate(nbytes: int, pinned: np.ndarray, device: cupy.ndarray) -> float:
    """Bytes a second of a plain copy from one pinned buffer, again and again."""
    times, stream = -(-nbytes // pinned.nbytes), cupy.cuda.get_current_stream()
    copy = (device.data.ptr, pinned.ctypes.data, pinned.nbytes, runtime.memcpyHostToDevice)
    stream.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        runtime.memcpyAsync(*copy, stream.ptr)
    stream.synchronize()
    return times * pinned.nbytes / (time.perf_counter() - begin)


def allocation_seconds(nbytes: int) -> float:
    """What the allocation of the stage alone takes, from an empty pool."""
    empty_pool()
    begin = time.perf_counter()
    array = cuda.empty((nbytes,), np.uint8)
    seconds = time.perf_counter() - begin
    del array
    return seconds


def writer_seconds(setting: Setting) -> float:
    """What it takes to make the threads of a load with their pinned buffers, and to end them."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        size = (setting.threads, setting.buffers, setting.piece_bytes)
        with device_writers(*size) as open_writer:
            for_each(range(setting.threads), _pinning(open_writer), setting.threads)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _pinning(open_writer: Callable[[], DeviceWriter]) -> Worker:
    @contextmanager
    def worker():
        writer = open_writer()
        with writer:
            for buffer in writer.buffers:
                buffer.bytes[:] = 0  # as reading does before memory is registered
            writer.memory.register()
            yield lambda job: []

    return worker


def empty_pool() -> None:
    """Leave the device's memory as a process finds it that begins.

    The driver clears what was freed: an allocation that needs it again at once waits for that.
    """
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.cuda.Device().synchronize()
    time.sleep(CLEARING_SECONDS)


def verify(weights: StageWeights, checkpoint: SafetensorsCheckpoint, config: ModelConfig) -> None:
    """The first array, the last, and those of a layer between: bit for bit those of the files."""
    middle = config.num_hidden_layers // 2
    for layer, field in stage_fields(config, range(config.num_hidden_layers)):
        if layer not in (None, middle):
            continue
        array = getattr(weights if layer is None else weights.layers[layer], field.name)
        stored = numpy_dtype(checkpoint.tensors[field.parts[0]])
        dtype = stored if isinstance(array, Quantized) else array.dtype
        expected, first = np.empty(field.shape, dtype), 0
        for name, shape in zip(field.parts, field.shapes, strict=True):
            checkpoint.read_into(name, expected[first : first + shape[0]])
            first += shape[0]
        pairs = [(array, expected)]
        if isinstance(array, Quantized):
            quantized = quantize_rows(expected, kind=array.kind)
            pairs = [(array.values, quantized.values), (array.scale, quantized.scale)]
        for found, wanted in pairs:
            same = np.array_equal(found.get().view(np.uint8), wanted.view(np.uint8))
            assert same, f"{layer} {field.name} differs from the file"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoint is written.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-7b")
@click.option("--layers", default=32)
@click.option("--files", default=3)
@click.option("--saved", type=click.Choice(["float16", "bfloat16"]), default="float16")
@click.option("--dtype", help="What is loaded; as saved if not given.")
@click.option("--quantize", type=click.Choice(["fp8", "int8"]))
@click.option("--by", default=["aio"], multiple=True, type=click.Choice(["aio", "threads"]))
@click.option("--threads", default=[THREADS], multiple=True, help="One number with aio.")
@click.option("--piece-kib", default=[2048, PIECE_BYTES >> 10], multiple=True)
@click.option("--buffers", default=[BUFFERS], multiple=True, help="Of every thread.")
@click.option("--repeats", default=2)
@click.option("--json", "out", type=click.Path(path_type=Path))
@one_line()
def main(
    folder,
    shape,
    layers,
    files,
    saved,
    dtype,
    quantize,
    by,
    threads,
    piece_kib,
    buffers,
    repeats,
    out,
):
    """Write, warm, load and print one line for each setting, the best once more at the end."""
    if "aio" in by and len(set(threads)) > 1:
        raise click.UsageError("a process has as many aio threads as it asked for first")
    device = choose_device("cuda")[0]
    config = replace(model_config(shape), num_hidden_layers=layers)
    target = storage_dtype(dtype or saved)
    settings = [
        Setting(reader, count, kib << 10, each)
        for reader, count, kib, each in product(by, threads, piece_kib, buffers)
    ]
    directory = Path(tempfile.mkdtemp(prefix="load_gpu-", dir=folder))
    try:
        begin = time.perf_counter()
        write_checkpoint(directory, config, storage_dtype(saved), files)
        print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
        result = measure(directory, config, target, quantize, settings, repeats)
    finally:
        shutil.rmtree(directory)
    result = {
        "bench": "load_gpu",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": device.name,
        "cores": os.cpu_count(),
        "versions": versions(device),
        "shape": shape,
        "layers": layers,
        "saved": saved,
        "dtype": target.name,
        "quantize": quantize,
    } | result
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


def measure(
    directory: Path, config, dtype, quantize: str | None, settings: list[Setting], repeats: int
) -> dict:
    """All loads in turn with plain copies, `repeats` times."""
    layers, paths = range(config.num_hidden_layers), sorted(directory.glob("*.safetensors"))
    nbytes = stage_bytes(config, layers, dtype)
    warming = read_rate(paths, THREADS, PIECE_BYTES)
    pinned = cupyx.empty_pinned(PINNED_BYTES, np.uint8)
    pinned[:] = 1
    on_device = cupy.empty(PINNED_BYTES, np.uint8)
    pinned_rate(nbytes, pinned, on_device)  # warms the card
    copies: list[float] = []
    loads: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for repeat, setting in product(range(repeats), settings):
        copies.append(pinned_rate(nbytes, pinned, on_device))
        checkpoint = SafetensorsCheckpoint(directory)
        empty_pool()
        begin = time.perf_counter()
        weights = load_stage(
            checkpoint, config, layers, dtype, cuda, **setting.arguments(), quantize=quantize
        )
        loads[setting].append(nbytes / (time.perf_counter() - begin))
        if repeat == 0 and setting in (settings[0], settings[-1]):
            verify(weights, checkpoint, config)
        del weights
    copy = statistics.median(copies)
    allocation = allocation_seconds(stage_bytes(config, layers, dtype, quantize))
    print(
        f"{nbytes / 1e9:.2f} GB | pinned copy {copy / 1e9:.1f} GB/s "
        f"({min(copies) / 1e9:.1f} to {max(copies) / 1e9:.1f}) | "
        f"warming read {warming / 1e9:.1f} GB/s | allocation {allocation * 1e3:.0f} ms"
    )
    reading = {
        cut: read_rate(paths, *cut)
        for cut in dict.fromkeys((setting.threads, setting.piece_bytes) for setting in settings)
    }
    runs, lines = [], {}
    for setting, rates in loads.items():
        rate, read = statistics.median(rates), reading[setting.threads, setting.piece_bytes]
        idle = writer_seconds(setting)
        lines[setting] = (
            f" > load_stage ({setting}): {nbytes / rate:.3f} s | "
            f"{rate / 1e9:5.1f} GB/s | {rate / copy:.2f} of a pinned copy | "
            f"reading alone {read / 1e9:5.1f} GB/s | idle threads {idle * 1e3:4.1f} ms"
        )
        print(lines[setting], flush=True)
        runs.append(asdict(setting) | {"bytes_per_second": rates, "of_pinned_copy": rate / copy})
        runs[-1] |= {"reading_alone_bytes_per_second": read, "idle_threads_seconds": idle}
    best = max(loads, key=lambda setting: statistics.median(loads[setting]))
    print(f"best\n{lines[best]}")
    return {
        "bytes": nbytes,
        "pinned_copy_bytes_per_second": copies,
        "allocation_seconds": allocation,
        "best": asdict(best),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
