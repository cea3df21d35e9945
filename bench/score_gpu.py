"""Questions a second of the evaluation phase on one GPU, random weights of a published shape.

    python bench/score_gpu.py --shape llama-7b --data hellaswag_val_full.txt.bz2 \
        --tokenizer tokenizer.model --questions 1000 --json out.json

The questions are spread over the set. In the same run the matrix products of one layer are timed
alone, at the same shapes, on the card as warm: what an evaluation without anything else would take.
"""

import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import click
import cupy
import numpy as np
from shapes import SHAPES, model_config, random_stage

from cupyllama.evaluate import ChoiceScores, Line, evaluate, plan
from cupyllama.ops import cuda
from cupyllama.ops.gemm import gemm
from cupyllama.parallel.devices import choose_device, storage_dtype
from cupyllama.provenance import versions
from cupyllama.sizing import DEFAULT_TOKENS
from cupyllama.tasks.conventions import CONVENTIONS, token_rows
from cupyllama.tasks.files import load_task
from cupyllama.tokenizer import load_tokenizer


def layer_products(config, dtype, tokens: int) -> tuple[float, float]:
    """Seconds and FLOPs of one layer's four matrix products, in a stream of 20 layers."""
    shapes = [
        (config.qkv_size, config.hidden_size),
        (config.hidden_size, config.q_size),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]
    products = []
    for n, k in shapes:
        x, weight = (cupy.empty((rows, k), dtype) for rows in (tokens, n))
        for array in (x, weight):  # values as in a run: zeros draw less power and run faster
            array[...] = cupy.sin(cupy.arange(array.size, dtype=np.float32)).reshape(array.shape)
        products.append((cupy.empty((tokens, n), dtype), x, weight))
    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    begin.record()
    for _ in range(20):
        for product in products:
            gemm(*product)
    end.record()
    end.synchronize()
    flops = sum(2 * tokens * n * k for n, k in shapes)
    return cupy.cuda.get_elapsed_time(begin, end) / 1e3 / 20, flops


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-7b")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--questions", default=1000)
@click.option("--dtype", default="float16")
@click.option("--micro-batch-tokens", default=[DEFAULT_TOKENS], multiple=True)
@click.option("--repeats", default=3)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(shape, data, tokenizer, questions, dtype, micro_batch_tokens, repeats, json_path):
    """Time evaluations and print one line for each micro-batch size."""
    config, device = model_config(shape), choose_device("cuda")[0]
    everything = load_task(data, "lm-eval").questions
    spread = [everything[i * len(everything) // questions] for i in range(questions)]
    tokens = load_tokenizer(tokenizer.parent, tokenizer)
    rows = token_rows(spread, tokens, CONVENTIONS["lm-eval"], True, config.max_length)
    line = Line(random_stage(config, storage_dtype(dtype), cuda, rows.longest))
    runs = []
    for size in micro_batch_tokens:
        batches = plan(rows.rows, size, cuda)
        warm = ChoiceScores.empty(len(rows.rows), size)
        evaluate(line, rows.rows, batches[:2], warm)  # compiles, and warms the card
        seconds, products = [], []
        for _ in range(repeats):
            products.append(layer_products(config, storage_dtype(dtype), size))
            scores = ChoiceScores.empty(len(rows.rows), size)
            begin = time.perf_counter()
            evaluate(line, rows.rows, batches, scores)
            seconds.append(time.perf_counter() - begin)
            assert np.isfinite(scores.loglikelihoods).all()
        median = statistics.median(seconds)
        layer_seconds = statistics.median(second for second, _ in products)
        layer_flops = products[0][1]
        head_flops = 2 * config.vocab_size * config.hidden_size
        head_flops *= sum(len(batch.logit_rows) for batch in batches)
        flops = layer_flops * config.num_hidden_layers * len(batches) + head_flops
        ceiling = layer_flops / layer_seconds
        run = {
            "micro_batch_tokens": size,
            "micro_batches": len(batches),
            "tokens_asked": rows.tokens_asked,
            "tokens_computed": scores.tokens_computed,
            "seconds": seconds,
            "questions_per_second": questions / median,
            "gemm_tflops": ceiling / 1e12,
            "run_tflops": flops / median / 1e12,
            "efficiency": flops / median / ceiling,
            "peak_memory_bytes": cupy.get_default_memory_pool().total_bytes(),
        }
        runs.append(run)
        print(
            f" > {shape} {dtype} (micro-batch={size:5}): {questions / median:6.1f} questions/s | "
            f"{run['run_tflops']:4.0f} of {run['gemm_tflops']:4.0f} TFLOP/s | "
            f"efficiency {run['efficiency']:.3f} | "
            f"{rows.tokens_asked / scores.tokens_computed:.3f} times fewer tokens",
            flush=True,
        )
    if json_path is not None:
        result = {
            "bench": "score_gpu",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": device.name,
            "versions": versions(device),
            "shape": shape,
            "dtype": dtype,
            "questions": questions,
            "runs": runs,
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
