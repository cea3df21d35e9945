"""`cupyllama bench score`: questions a second of a published shape with random weights."""

import copy
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.bench.gemm import (
    head_products,
    layer_flops,
    layer_products,
    layer_rate,
    product_flops,
)
from cupyllama.bench.measure import mark, result, seconds_between
from cupyllama.bench.rows import read_rows
from cupyllama.bench.shapes import model_config, random_stage
from cupyllama.bench.table import as_table
from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.config import ModelConfig
from cupyllama.errors import CupyllamaError, DeviceError
from cupyllama.evaluate import ChoiceScores, Line, evaluate, plan
from cupyllama.families import Stage
from cupyllama.kernels.definitions import FP8_ARCH
from cupyllama.packing import MicroBatch
from cupyllama.parallel.devices import Device, choose_dtype, storage_dtype
from cupyllama.sizing import activation_bytes
from cupyllama.tasks.conventions import TokenRows

# The matrix of a layer that attention comes after, in every family.
BEFORE_ATTENTION = "qkv_proj"
# Of what a stage calls, these queue no work.
_NO_WORK = {"empty", "to_device"}


def measure_score(
    device: Device,
    shape: str,
    questions: int,
    dtype: str,
    sizes: list[int],
    repeats: int,
    data: Path | None = None,
    tokenizer: Path | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """The evaluation phase at each size of micro-batches, `repeats` times.

    In turn with it the matrix products of one layer are timed alone, at the same shapes, on the
    card as warm: what an evaluation without anything else would take.

    Raises:
        DeviceError: the weights or a micro-batch do not fit.
        CupyllamaError: a result is no number.
    """
    from cupyllama.ops.cublaslt import algorithms

    config = model_config(shape)
    storage = storage_dtype(choose_dtype(dtype, dtype, device))
    _check_memory(device, shape, config, storage, min(sizes), quantize)
    rows = read_rows(config, questions, data, tokenizer)
    stage = random_stage(config, storage, device.ops, rows.longest, quantize=quantize)
    products = "fp8" if quantize == "fp8" else storage.name
    return result(
        "score",
        device,
        shape=shape,
        dtype=dtype,
        quantize=quantize,
        questions=len(rows.choice_start) - 1,
        data="generated" if data is None else data.name,
        runs=[_run(stage, rows, size, repeats, products) for size in sizes],
        algorithms=algorithms(),
    )


def _run(stage: Stage, rows: TokenRows, size: int, repeats: int, products: str) -> dict[str, Any]:
    """One size of micro-batches; `products`: what is multiplied, as `layer_rate` has it."""
    import cupy

    config, ops = stage.config, stage.ops
    batches = plan(rows.rows, size, ops)
    peak, seconds, rates = 0, [], []
    cupy.get_default_memory_pool().free_all_blocks()
    _timed_run(stage, rows, batches[:2], size)  # compiles, and warms the card
    for _ in range(repeats):
        seconds.append(_timed_run(stage, rows, batches, size))
        # before the products alone, which have arrays of their own
        peak = peak or cupy.get_default_memory_pool().total_bytes()
        rates.append(layer_rate(config, products, size))
    median, ceiling = statistics.median(seconds), statistics.median(rates)
    flops = evaluation_flops(config, batches)
    return {
        "micro_batch_tokens": size,
        "micro_batches": len(batches),
        "tokens_asked": rows.tokens_asked,
        "tokens_computed": sum(len(batch.token_ids) for batch in batches),
        "seconds": seconds,
        "questions_per_second": (len(rows.choice_start) - 1) / median,
        "gemm_tflops": ceiling / 1e12,
        "run_tflops": flops / median / 1e12,
        "efficiency": flops / median / ceiling,
        "peak_memory_bytes": peak,
        "breakdown": breakdown(stage, batches[len(batches) // 2]),
    }


def _timed_run(stage: Stage, rows: TokenRows, batches: list[MicroBatch], size: int) -> float:
    def halved(tokens: int) -> None:
        raise DeviceError(
            f"out of memory with micro-batches of {size:,} tokens",
            f"Give --micro-batch-tokens {tokens}.",
        )

    scores = ChoiceScores.empty(len(rows.rows), size)
    begin = time.perf_counter()
    evaluate(Line(stage), rows.rows, batches, scores, on_halved=halved)
    seconds = time.perf_counter() - begin
    if not np.isfinite(scores.loglikelihoods[scores.done]).all():
        raise CupyllamaError("a log-likelihood is no number", "Run `cupyllama bench kernels`.")
    return seconds


def evaluation_flops(config: ModelConfig, batches: list[MicroBatch]) -> int:
    """Of all matrix products that are run, those of padding among them.

    In the last layer all tokens have keys and values, but what follows attention is computed for
    rows with targets alone, as is the head.
    """
    tokens = sum(len(batch.token_ids) for batch in batches)
    rows = sum(len(batch.logit_rows) for batch in batches)
    flops = config.num_hidden_layers * layer_flops(config, tokens)
    for n, k in head_products(config).values():
        flops += product_flops(rows, n, k)
    for name, (n, k) in layer_products(config).items():
        if name != BEFORE_ATTENTION:
            flops += product_flops(rows, n, k) - product_flops(tokens, n, k)
    return flops


class TimedOps:
    """The operations of a device, with a mark before and after each call."""

    def __init__(self, ops: Any, names: dict[int, str]):
        """`names`: what arrays are called, by their ids: it tells calls of one operation apart."""
        self._ops, self._names = ops, names
        self.place = "rest"
        self.calls: list[tuple[str, str, Any, Any]] = []  # place, operation, begin, end

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        if name in _NO_WORK or not callable(value):
            return value
        return partial(self._call, name, value)

    def _call(self, name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
        operands = (*args, *kwargs.values())
        weights = [self._names[id(operand)] for operand in operands if id(operand) in self._names]
        begin = mark()
        out = operation(*args, **kwargs)
        # The first is its matrix, or a norm's weight; the others are biases.
        self.calls.append((self.place, " ".join([name, *weights[:1]]), begin, mark()))
        return out


def timed_stage(stage: Stage, ops: TimedOps) -> Stage:
    """The stage on such operations, to which it says which of them belong to whole layers."""

    def mix(layer: Any, *args: Any) -> Any:
        ops.place = "rest" if layer is stage.weights.layers[-1] else "layer"
        return type(stage).mix(timed, layer, *args)

    timed = copy.copy(stage)
    timed.ops = timed.group = ops  # no other ranks have parts of it
    timed.mix = mix
    return timed


def breakdown(stage: Stage, batch: MicroBatch) -> dict[str, Any]:
    """Where the time of a micro-batch goes, each operation timed by itself.

    Returns:
        layer: seconds by operation, the mean over all layers but the last, which computes less;
        rest: the same of the last one, the embedding and the head; seconds: of the whole pass, in
        which marks cost a little too.
    """
    weights = stage.weights
    names: dict[int, str] = {}
    for holder in (weights, *weights.layers):
        names |= {id(value): name for name, value in vars(holder).items() if value is not None}
    ops = TimedOps(stage.ops, names)
    timed, uploaded = timed_stage(stage, ops), ops.upload(batch)
    timed.forward(uploaded)  # memory is had, and the card is warm
    ops.calls.clear()
    begin = mark()
    timed.forward(uploaded)
    seconds = seconds_between(begin, mark())
    sums: dict[str, dict[str, float]] = {"layer": {}, "rest": {}}
    for place, name, first, last in ops.calls:
        share = seconds_between(first, last)
        share /= len(weights.layers) - 1 if place == "layer" else 1
        sums[place][name] = sums[place].get(name, 0.0) + share
    return {**sums, "seconds": seconds}


def score_table(measured: dict[str, Any]) -> str:
    """A line for each size of micro-batches, and where the time goes at the first one."""
    headers = ["micro-batch", "questions/s", "TFLOP/s", "ceiling", "efficiency"]
    headers += ["tokens saved", "peak GB"]
    lines = [
        [
            f"{run['micro_batch_tokens']:,}",
            f"{run['questions_per_second']:,.1f}",
            f"{run['run_tflops']:,.0f}",
            f"{run['gemm_tflops']:,.0f}",
            f"{run['efficiency']:.3f}",
            f"{100 * (1 - run['tokens_computed'] / run['tokens_asked']):.1f} %",
            f"{run['peak_memory_bytes'] / 1e9:.1f}",
        ]
        for run in measured["runs"]
    ]
    first = measured["runs"][0]
    return (
        f"{measured['shape']} in {measured['quantize'] or measured['dtype']} on {measured['gpu']}: "
        f"{measured['questions']:,} questions ({measured['data']}), "
        f"{first['tokens_asked']:,} tokens\n"
        + as_table(headers, lines, left=0)
        + f"\n\nwhere the time goes, micro-batches of {first['micro_batch_tokens']:,} tokens\n"
        + _breakdown_table(first["breakdown"])
    )


def _breakdown_table(spent: dict[str, Any]) -> str:
    lines = []
    for title, times in (
        ("a layer", spent["layer"]),
        ("the last layer and the ends", spent["rest"]),
    ):
        whole = sum(times.values())
        lines.append([title, f"{1e6 * whole:,.0f}", "100.0 %"])
        lines += [
            [f"  {name}", f"{1e6 * seconds:,.0f}", f"{100 * seconds / whole:.1f} %"]
            for name, seconds in times.items()
        ]
    return as_table(["operation", "us", "share"], lines)


def _check_memory(
    device: Device,
    shape: str,
    config: ModelConfig,
    dtype: np.dtype,
    tokens: int,
    quantize: str | None,
) -> None:
    """Before anything slow: do the weights and a micro-batch fit, and is there fp8 if asked for?"""
    if quantize == "fp8" and device.compute_capability < FP8_ARCH:
        raise DeviceError(f"{device.name} has no fp8", "Leave out --quantize.")
    weights = stage_bytes(config, range(config.num_hidden_layers), dtype, quantize)
    batch = activation_bytes(config, tokens, dtype.name, device.ops.LOGIT_CHUNK, quantize)
    free = device.free_bytes()
    if weights + batch > free:
        raise DeviceError(
            f"{shape} in {dtype.name} needs {weights / 1e9:.1f} GB for its weights and "
            f"{batch / 1e9:.1f} GB for {tokens:,} tokens; {device.name} has {free / 1e9:.1f} GB",
            "Give a smaller --shape or --micro-batch-tokens.",
        )
