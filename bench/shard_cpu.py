"""Sharding's rate beside that of cp, for the same bytes on the same disk in the same run.

python bench/shard_cpu.py --folder /data --gigabytes 4

Both are over when their files have been flushed to the disk. The checkpoint is made for the
occasion, of LLaMA-7B's matrices in float16, and is in the page cache for both.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from math import prod
from pathlib import Path

import click
import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LAYER_BYTES = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11008)


def write_checkpoint(directory: Path, layers: int) -> int:
    """config.json and model.safetensors, of random bytes; their size."""
    from cupyllama.checkpoint.fields import stage_fields
    from cupyllama.config import load_config

    directory.mkdir()
    config = CONFIG | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for _, field in stage_fields(load_config(directory), range(layers)):
        for name, shape in zip(field.parts, field.shapes, strict=True):
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = np.random.default_rng(0).bytes((64 << 20) + 1)  # odd, so that no two pages are alike
    with open(directory / "model.safetensors", "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end
        while left:
            left -= file.write(memoryview(block)[:left])
        os.fsync(file.fileno())
    return sum(path.stat().st_size for path in directory.iterdir())


def seconds_of(command: list) -> tuple[float, int]:
    """Wall time of a command, and the most memory that it had."""
    begin = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise click.ClickException(f"{command[0]} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def remove(directory: Path) -> None:
    """And wait until the disk has done it, which would else slow what comes next."""
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    os.sync()


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=None, help="On which disk.")
@click.option("--gigabytes", default=4.0)
@click.option("--stages", default=4)
@click.option("--repeats", default=3)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(folder, gigabytes, stages, repeats, json_path):
    """Print both rates and their ratio."""
    shard, copy, peaks = [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, output = Path(scratch) / "source", Path(scratch) / "output"
        nbytes = write_checkpoint(source, max(stages, round(gigabytes * 1e9 / LAYER_BYTES)))
        sharding = [sys.executable, "-m", "cupyllama", "shard", "--model", source, "--quiet"]
        sharding += ["--output", output, "--stages", stages]
        # as shard does, the copy ends with the data and its directory on the disk
        copying = ["sh", "-c", f"cp -r '{source}' '{output}' && sync '{output}'/* '{output}'"]
        for _ in range(repeats):
            took, peak = seconds_of(sharding)
            shard.append(nbytes / took / 1e9)
            peaks.append(peak)
            remove(output)
            copy.append(nbytes / seconds_of(copying)[0] / 1e9)
            remove(output)
    ratio = statistics.median(shard) / statistics.median(copy)
    result = {
        "bench": "shard_cpu",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "bytes": nbytes,
        "shard_gb_per_second": shard,
        "cp_gb_per_second": copy,
        "ratio_of_medians": ratio,
        "shard_peak_bytes": max(peaks),
    }
    click.echo(f"{nbytes / 1e9:.2f} GB, {stages} stages, {repeats} runs")
    for name, rates in (("shard", shard), ("cp", copy)):
        shown = " ".join(f"{rate:.2f}" for rate in rates)
        click.echo(f"{name:<6} {statistics.median(rates):.2f} GB/s  ({shown})")
    click.echo(f"ratio  {ratio:.2f}; peak memory of shard {max(peaks) / 1e6:.0f} MB")
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
