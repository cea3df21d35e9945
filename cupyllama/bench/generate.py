"""`cupyllama bench generate`: latency against throughput of a published shape, random weights.

Each batch is so many prompts of random tokens, continued side by side by so many tokens. A query is
a prompt with all its new tokens; the latency of a token is the time of the batch by the new tokens
of one. The floor is what reading the weights, and the keys and values, takes at the rate of a copy
within the device: a decoder that reads them once for every token cannot be faster.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupyllama.bench.measure import copy_rate, result
from cupyllama.bench.shapes import model_config, random_stage
from cupyllama.bench.table import as_table
from cupyllama.checkpoint.fields import stage_bytes, stage_fields
from cupyllama.config import ModelConfig
from cupyllama.errors import DeviceError, UsageError
from cupyllama.families import family_of
from cupyllama.generation.blocks import BlockPool, blocks_for
from cupyllama.generation.engine import Decoder, Engine, Event, Prompt
from cupyllama.generation.session import decode_ops, make_cache
from cupyllama.kernels.definitions import FP8_ARCH
from cupyllama.parallel.devices import Device, choose_dtype, storage_dtype
from cupyllama.parallel.pipeline import connect_group, make_grid
from cupyllama.parallel.world import World
from cupyllama.tensor_parallel import check_tensor_parallel, part_of

WARM_UP_TOKENS = 3  # of a query: compiles what there is to compile, and captures the graph
# Of the fields of a stage, those of which a token reads one row.
_TABLES = ("embed_tokens", "embed_positions")
_HOST_COPY_BYTES = 256 << 20


def measure_generate(
    device: Device,
    shape: str,
    batch_sizes: Sequence[int],
    prompt_len: int,
    new_tokens: int,
    dtype: str,
    quantize: Sequence[str],
    repeats: int,
    world: World | None = None,
    on_run: Callable[[dict[str, Any]], None] = lambda measured: None,
) -> dict[str, Any]:
    """Every batch size at every quantization, `repeats` times.

    A batch that memory does not hold is marked, and the sweep goes on.

    Args:
        quantize: of none, fp8, int8.
        world: of ranks that share the matrices; None: they are whole. The floor is then of the
            bytes that each of them reads.
        on_run: called after each batch size with all that was measured so far.

    Raises:
        UsageError: the model has fewer positions, or heads that the ranks cannot share.
        DeviceError: the weights do not fit, or there is no fp8.
    """
    from tqdm import tqdm

    config = model_config(shape)
    if prompt_len + new_tokens > config.max_length:
        raise UsageError(
            f"--prompt-len {prompt_len} with --new-tokens {new_tokens} passes the "
            f"{config.max_length:,} tokens of {shape}",
            "Give fewer.",
        )
    world = world or World()
    check_tensor_parallel(config, world.size)
    grid = make_grid(world, replicas=1, tensor_parallel=world.size)
    config = part_of(config, grid.tensor_share)
    group = connect_group(world, grid, device, config, decode_ops(device))
    storage = storage_dtype(choose_dtype(dtype, dtype, device))
    kinds = [None if kind == "none" else kind for kind in quantize]
    for kind in kinds:
        _check_device(device, shape, config, storage, kind)
    rate = copy_rate() if device.kind == "cuda" else host_copy_rate()
    Stage = family_of(config).model.Stage  # noqa: N806
    settings: list[dict[str, Any]] = []
    measured = result(
        "generate",
        device,
        shape=shape,
        dtype=dtype,
        tensor_parallel=world.size,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        copy_bytes_per_second=rate,
        settings=settings,
    )
    steps = len(kinds) * len(batch_sizes) * repeats * new_tokens
    quiet = None if world.rank == 0 else True  # None: on a terminal only
    with tqdm(total=steps, unit="step", desc=shape, disable=quiet) as bar:
        for kind in kinds:
            weights = random_stage(config, storage, device.ops, 1, quantize=kind).weights
            runs: list[dict[str, Any]] = []
            settings.append({"quantize": kind, "runs": runs})
            for batch_size in batch_sizes:
                bar.set_postfix_str(f"{kind or dtype}, batch {batch_size:,}")
                stage = Stage(config, weights, decode_ops(device), prompt_len + new_tokens, group)
                run = Run(world, device, stage, storage, batch_size, prompt_len, new_tokens)
                seconds = run.seconds(repeats, bar.update)
                peak = used_bytes(device)  # pools keep what they had
                del run, stage
                gc.collect()  # of the arrays that are left, an error's frames have some
                device.ops.release_memory()
                floor = floor_bytes(config, storage, kind, batch_size, prompt_len, new_tokens)
                least = floor / rate
                runs.append(figures(batch_size, new_tokens, seconds, least, peak))
                on_run(measured)
            del weights
            device.ops.release_memory()
    return measured


class Run:
    """One batch size, and what generates it."""

    def __init__(
        self,
        world: World,
        device: Device,
        stage: Any,
        dtype: np.dtype,
        batch_size: int,
        prompt_len: int,
        new_tokens: int,
    ):
        self.world, self.device, self.stage, self.dtype = world, device, stage, dtype
        self.batch_size, self.new_tokens = batch_size, new_tokens
        self.max_keys = prompt_len + new_tokens
        self.blocks = batch_size * blocks_for(self.max_keys) + 1
        generator = np.random.default_rng(batch_size)
        ids = generator.integers(0, stage.config.vocab_size, (batch_size, prompt_len))
        self.rows = ids.tolist()

    def seconds(self, repeats: int, on_steps: Callable[[int], Any]) -> list[float] | None:
        """How long the whole batch takes; None where memory does not hold it."""
        done = 0
        found: list[float] = []

        def on_event(event: Event) -> None:
            nonlocal done
            done += 1
            if done % self.batch_size == 0:
                on_steps(1)

        try:
            with self.device.ops.memory_errors():
                decoder = self.decoder()
                if decoder is None:
                    on_steps(repeats * self.new_tokens)
                    return None
                self.generate(decoder, min(WARM_UP_TOKENS, self.new_tokens), lambda event: None)
                for _ in range(repeats):
                    found.append(self.generate(decoder, self.new_tokens, on_event))
        except (MemoryError, DeviceError):  # the latter is the engine's word for it
            if self.world.size > 1:
                raise  # the others wait for this rank
            on_steps(repeats * self.new_tokens - done // self.batch_size)
            return None
        return found

    def decoder(self) -> Decoder | None:
        """As `Session.engine` makes it, with a cache for all sequences at a time.

        None on all ranks where one of them has no memory for that.
        """
        ops, decoder = self.stage.ops, None
        try:
            with self.device.ops.memory_errors():
                cache = make_cache(self.stage, self.device, self.blocks, self.dtype)
                size = self.stage.config.vocab_size
                decoder = ops.Decoder(self.stage, cache, self.batch_size, self.max_keys, size)
        except MemoryError:
            pass
        return decoder if None not in self.world.allgather(decoder and 1) else None

    def generate(
        self, decoder: Decoder, new_tokens: int, on_event: Callable[[Event], None]
    ) -> float:
        """All queries, from their tokens to the last one that was sampled."""
        prompts = [Prompt(row, new_tokens) for row in self.rows]
        # A new pool: the old one knows the prompts of the time before, and what they left.
        engine = Engine(decoder, BlockPool(self.blocks), self.batch_size, self.max_keys)
        begin = time.perf_counter()
        for event in engine.generate(prompts):
            on_event(event)
        return time.perf_counter() - begin


def figures(
    batch_size: int, new_tokens: int, seconds: list[float] | None, floor: float, peak: int | None
) -> dict[str, Any]:
    """What is said of a batch size.

    Args:
        seconds: of the whole batch, each time; None where there was no memory for it.
        floor: seconds of a step of the batch, if reading memory were all.
    """
    run = {
        "batch_size": batch_size,
        "out_of_memory": seconds is None,
        "floor_ms": 1e3 * floor,
    }
    if seconds is None:
        return run
    median = statistics.median(seconds)
    return run | {
        "seconds": seconds,
        "ms_per_token": 1e3 * median / new_tokens,
        "times_floor": median / new_tokens / floor,
        "queries_per_second": batch_size / median,
        "tokens_per_second": batch_size * new_tokens / median,
        "peak_memory_bytes": peak,
    }


def floor_bytes(
    config: ModelConfig,
    dtype: np.dtype,
    quantize: str | None,
    batch_size: int,
    prompt_len: int,
    new_tokens: int,
) -> int:
    """Bytes that a step reads at least: all weights once, and the keys and values of its sequences.

    Of the cache, the mean over all steps: the first of them finds the prompt, the last all tokens
    but one.
    """
    fields = stage_fields(config, range(config.num_hidden_layers), quantize)
    weights = sum(
        field.nbytes(dtype)
        for _, field in fields
        if field.name not in _TABLES
        or (field.name == "embed_tokens" and config.tie_word_embeddings)  # the head's matrix
    )
    key = 2 * config.kv_size * dtype.itemsize * config.num_hidden_layers
    return weights + round(batch_size * (prompt_len + (new_tokens - 1) / 2) * key)


def used_bytes(device: Device) -> int | None:
    """Of the GPU's memory, by whatever has it; None on a CPU."""
    if device.kind == "cpu":
        return None
    import cupy

    free, total = cupy.cuda.Device().mem_info
    return total - free


def host_copy_rate() -> float:
    """Bytes a second, read and written, of a large copy within the host's memory."""
    source, target = (np.ones(_HOST_COPY_BYTES, np.uint8) for _ in range(2))
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - begin)
    return 2 * _HOST_COPY_BYTES / statistics.median(seconds)


def generate_table(measured: dict[str, Any]) -> str:
    """A line for each batch size at each quantization."""
    headers = ["weights", "batch", "ms a token", "floor", "of the floor", "queries/s"]
    headers += ["tokens/s", "peak GB"]
    lines = []
    for setting in measured["settings"]:
        for run in setting["runs"]:
            line = [setting["quantize"] or measured["dtype"], f"{run['batch_size']:,}"]
            if run["out_of_memory"]:
                lines.append([*line, "out of memory", f"{run['floor_ms']:,.2f}", *4 * ["-"]])
                continue
            peak = run["peak_memory_bytes"]
            lines.append(
                [
                    *line,
                    f"{run['ms_per_token']:,.2f}",
                    f"{run['floor_ms']:,.2f}",
                    f"{run['times_floor']:.3f}",
                    f"{run['queries_per_second']:,.2f}",
                    f"{run['tokens_per_second']:,.1f}",
                    "-" if peak is None else f"{peak / 1e9:.1f}",
                ]
            )
    ranks = measured["tensor_parallel"]
    return (
        f"{measured['shape']} in {measured['dtype']} on {f'{ranks} × ' if ranks > 1 else ''}"
        f"{measured['gpu']}: "
        f"{measured['new_tokens']:,} tokens after {measured['prompt_len']:,}; "
        f"copy {measured['copy_bytes_per_second'] / 1e9:,.0f} GB/s\n" + as_table(headers, lines)
    )


def _check_device(
    device: Device, shape: str, config: ModelConfig, dtype: np.dtype, quantize: str | None
) -> None:
    """Before anything slow: do the weights fit, and is there fp8 if asked for?"""
    if quantize == "fp8" and device.kind == "cuda" and device.compute_capability < FP8_ARCH:
        raise DeviceError(f"{device.name} has no fp8", "Leave it out of --quantize.")
    need, free = (
        stage_bytes(config, range(config.num_hidden_layers), dtype, quantize),
        device.free_bytes(),
    )
    if free is not None and need > free:
        raise DeviceError(
            f"{shape} in {quantize or dtype.name} needs {need / 1e9:.1f} GB for its weights, and "
            f"{device.name} has {free / 1e9:.1f} GB free",
            "Give a smaller --shape, or --quantize int8.",
        )
