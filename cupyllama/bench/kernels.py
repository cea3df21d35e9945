"""`cupyllama bench kernels`: every kernel checked, timed, and set against what the GPU can do."""

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cupyllama.bench import cases, cases_llama, cases_opt
from cupyllama.bench.cases import Case, Setting, attention
from cupyllama.bench.gemm import layer_rate
from cupyllama.bench.measure import Ceilings, Stopwatch, copy_rate, result
from cupyllama.bench.rows import few_shot_rows, read_rows
from cupyllama.bench.shapes import model_config
from cupyllama.bench.table import as_table
from cupyllama.evaluate import plan
from cupyllama.kernels.definitions import FP8_ARCH
from cupyllama.parallel.devices import Device, choose_dtype, storage_dtype

# By family: every kernel that a model launches, and those of fp8.
EACH = {
    "llama": (
        *(cases.gather, cases_llama.rmsnorm, cases_llama.linear_rope, attention),
        *(cases_llama.linear_swiglu, cases.log_probs, cases_llama.rope, cases_llama.swiglu),
        cases.dequantize,
    ),
    "opt": (
        *(cases.gather, cases_opt.add, cases_opt.layernorm, attention, cases_opt.linear_relu),
        *(cases_opt.linear, cases.log_probs, cases.dequantize),
    ),
}
EIGHT_BIT = {
    "llama": (
        cases.quantize,
        partial(cases_llama.rmsnorm, quantized=True),
        partial(cases_llama.swiglu, quantized=True),
    ),
    "opt": (cases.quantize, partial(cases_opt.layernorm, quantized=True)),
}


def measure_kernels(
    device: Device,
    shapes: list[str],
    dtype: str,
    tokens: int,
    repeats: int,
    data: Path | None = None,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Every kernel at every shape, on one full micro-batch of rows such as HellaSwag's.

    Raises:
        CupyllamaError: a kernel's result is not what its definition says.
    """
    storage, runs = storage_dtype(choose_dtype(dtype, dtype, device)), []
    rates = [layer_rate(model_config(shape), dtype, tokens) for shape in shapes for _ in range(3)]
    # The better half: the first ones found a cold card.
    ceilings = Ceilings(copy_rate(), statistics.median(sorted(rates)[len(rates) // 2 :]))
    watch = Stopwatch(repeats)
    for shape in shapes:
        config = model_config(shape)
        questions = max(tokens // 128, 8)  # of 190 tokens each: more than fill it
        rows = read_rows(config, questions, data, tokenizer).rows
        setting = Setting(config, storage, device.ops, plan(rows, tokens, device.ops)[0])
        long_rows = []
        for name, own in (("attention, few-shot", False), ("attention, own prompts", True)):
            shots = few_shot_rows(questions, config.vocab_size, own=own).rows
            batch = plan(shots, tokens, device.ops)[0]
            long_rows.append(partial(attention, replace(setting, batch=batch), name))
        has_fp8 = device.compute_capability >= FP8_ARCH
        every = EACH[config.family] + (EIGHT_BIT[config.family] if has_fp8 else ())
        for make in (*(partial(each, setting) for each in every), *long_rows):
            case = make()
            case.check()
            run = figures(case, watch.seconds(case.launch), ceilings)
            runs.append({"kernel": case.name, "shape": shape, **run})
            del case  # and its arrays
    return result(
        "kernels",
        device,
        dtype=dtype,
        micro_batch_tokens=tokens,
        copy_bytes_per_second=ceilings.copy_bytes_per_second,
        gemm_tflops=ceilings.gemm_flops_per_second / 1e12,
        runs=runs,
    )


def figures(case: Case, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """What a timed launch reached."""
    nbytes, flops = case.work
    return {
        "seconds": seconds,
        "bytes": nbytes,
        "flops": flops,
        "on_matrix_units": case.on_matrix_units,
        "bytes_per_second": nbytes / seconds,
        "tflops": flops / seconds / 1e12,
        "of_ceiling": ceilings.seconds(nbytes, flops) / seconds,
    }


def kernels_table(measured: dict[str, Any]) -> str:
    """The ceilings, and a line for each kernel and shape."""
    lines = [
        [
            run["kernel"],
            run["shape"],
            f"{1e6 * run['seconds']:,.1f}",
            f"{run['bytes_per_second'] / 1e9:,.0f}",
            f"{run['tflops']:,.1f}" if run["on_matrix_units"] else "-",
            f"{run['of_ceiling']:.2f}",
        ]
        for run in measured["runs"]
    ]
    headers = ["kernel", "shape", "us", "GB/s", "TFLOP/s", "of the ceiling"]
    return (
        f"{measured['gpu']}, {measured['dtype']}, {measured['micro_batch_tokens']:,} tokens; "
        f"ceilings: copy {measured['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"matrix products {measured['gemm_tflops']:,.0f} TFLOP/s\n"
        + as_table(headers, lines, left=2)
    )
