"""How fast a checkpoint in the page cache gets to the GPU, beside a plain pinned copy.

    python bench/load_gpu.py --folder /tmp --layers 18 --json out.json

A synthetic checkpoint of a published shape (18 layers of LLaMA-7B in float16: 7.8 GB) is written,
read once to warm the page cache, and loaded with several numbers of threads and sizes of chunks, in
turn with copies of as many bytes from one pinned buffer. A load begins with an empty memory pool,
so it pays for the allocation of what it fills, as in a run of the engine; the copy does not.
"""

import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from itertools import product
from math import prod
from pathlib import Path

import click
import cupy
import cupyx
import numpy as np
from cupy.cuda import runtime
from shapes import SHAPES, model_config

from cupyllama.checkpoint.llama import stage_bytes, stage_fields
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.checkpoint.source import DTYPES
from cupyllama.config import ModelConfig
from cupyllama.loading import CHUNK_BYTES, THREADS, for_each, load_stage
from cupyllama.model.llama import StageWeights
from cupyllama.ops import cuda
from cupyllama.parallel.devices import choose_device, storage_dtype
from cupyllama.provenance import versions

PINNED_BYTES = 256 << 20


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


def read_rate(paths: list[Path], threads: int, chunk_bytes: int) -> float:
    """Bytes a second that threads read into a small buffer of their own, for no further use."""
    opened = [os.open(path, os.O_RDONLY) for path in paths]
    sizes = [path.stat().st_size for path in paths]

    def jobs():
        for file, size in zip(opened, sizes, strict=True):
            yield from ((file, offset) for offset in range(0, size, chunk_bytes))

    def worker():
        buffer = bytearray(chunk_bytes)
        return nullcontext(lambda job: os.preadv(job[0], [buffer], job[1]))

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


def allocation_seconds(config: ModelConfig, dtype: np.dtype) -> float:
    """What the allocation of the arrays alone takes, from an empty pool."""
    empty_pool()
    begin = time.perf_counter()
    layers = range(config.num_hidden_layers)
    arrays = [cuda.empty(field.shape, dtype) for _, field in stage_fields(config, layers)]
    seconds = time.perf_counter() - begin
    del arrays
    return seconds


def empty_pool() -> None:
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.cuda.Device().synchronize()


def verify(weights: StageWeights, checkpoint: SafetensorsCheckpoint, config: ModelConfig) -> None:
    """The first array, the last, and those of a layer between: bit for bit those of the files."""
    middle = config.num_hidden_layers // 2
    for layer, field in stage_fields(config, range(config.num_hidden_layers)):
        if layer not in (None, middle):
            continue
        array = getattr(weights if layer is None else weights.layers[layer], field.name)
        expected, first = np.empty(field.shape, array.dtype), 0
        for name, shape in zip(field.parts, field.shapes, strict=True):
            checkpoint.read_into(name, expected[first : first + shape[0]])
            first += shape[0]
        same = np.array_equal(array.get().view(np.uint8), expected.view(np.uint8))
        assert same, f"{layer} {field.name} differs from the file"


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoint is written.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-7b")
@click.option("--layers", default=18)
@click.option("--files", default=3)
@click.option("--saved", type=click.Choice(["float16", "bfloat16"]), default="float16")
@click.option("--dtype", help="What is loaded; as saved if not given.")
@click.option("--threads", default=[4, 8, THREADS, 16], multiple=True)
@click.option("--chunk-kib", default=[1024, CHUNK_BYTES >> 10, 16384], multiple=True)
@click.option("--repeats", default=3)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(folder, shape, layers, files, saved, dtype, threads, chunk_kib, repeats, json_path):
    """Write, warm, load and print one line for each number of threads and size of chunk."""
    device = choose_device("cuda")[0]
    config = replace(model_config(shape), num_hidden_layers=layers)
    target = storage_dtype(dtype or saved)
    directory = Path(tempfile.mkdtemp(prefix="load_gpu-", dir=folder))
    try:
        begin = time.perf_counter()
        write_checkpoint(directory, config, storage_dtype(saved), files)
        print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
        result = measure(directory, config, target, threads, chunk_kib, repeats)
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
    } | result
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def measure(directory: Path, config, dtype, threads, chunk_kib, repeats: int) -> dict:
    """All loads in turn with plain copies, `repeats` times."""
    layers, paths = range(config.num_hidden_layers), sorted(directory.glob("*.safetensors"))
    nbytes = stage_bytes(config, layers, dtype)
    warming = read_rate(paths, THREADS, CHUNK_BYTES)
    pinned = cupyx.empty_pinned(PINNED_BYTES, np.uint8)
    pinned[:] = 1
    on_device = cupy.empty(PINNED_BYTES, np.uint8)
    pinned_rate(nbytes, pinned, on_device)  # warms the card
    cuts = list(product(threads, chunk_kib))
    copies: list[float] = []
    loads: dict[tuple[int, int], list[float]] = {cut: [] for cut in cuts}
    for repeat, (count, kib) in product(range(repeats), cuts):
        copies.append(pinned_rate(nbytes, pinned, on_device))
        checkpoint = SafetensorsCheckpoint(directory)
        empty_pool()
        begin = time.perf_counter()
        weights = load_stage(
            checkpoint, config, layers, dtype, cuda, threads=count, chunk_bytes=kib << 10
        )
        loads[count, kib].append(nbytes / (time.perf_counter() - begin))
        if repeat == 0 and (count, kib) in (cuts[0], cuts[-1]):
            verify(weights, checkpoint, config)
        del weights
    copy = statistics.median(copies)
    allocation = allocation_seconds(config, dtype)
    print(
        f"{nbytes / 1e9:.2f} GB | pinned copy {copy / 1e9:.1f} GB/s "
        f"({min(copies) / 1e9:.1f} to {max(copies) / 1e9:.1f}) | "
        f"warming read {warming / 1e9:.1f} GB/s | allocation {allocation * 1e3:.0f} ms"
    )
    runs = []
    for (count, kib), rates in loads.items():
        rate, read = statistics.median(rates), read_rate(paths, count, kib << 10)
        print(
            f" > load_stage (threads={count:2}, chunk={kib:6} KiB): {nbytes / rate:.3f} s | "
            f"{rate / 1e9:5.1f} GB/s | {rate / copy:.2f} of a pinned copy | "
            f"reading alone {read / 1e9:5.1f} GB/s",
            flush=True,
        )
        runs.append({"threads": count, "chunk_kib": kib, "bytes_per_second": rates})
        runs[-1] |= {"of_pinned_copy": rate / copy, "reading_alone_bytes_per_second": read}
    return {
        "bytes": nbytes,
        "pinned_copy_bytes_per_second": copies,
        "allocation_seconds": allocation,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
