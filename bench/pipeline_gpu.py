"""Questions a second of several ranks, random weights of a published shape.

    mpirun -n 4 python bench/pipeline_gpu.py --shape llama-7b --data hellaswag_val_full.txt.bz2 \
        --tokenizer tokenizer.model --questions 1000 --json out.json
    python bench/pipeline_gpu.py …        # one process, to compare with
    mpirun -n 4 python bench/pipeline_gpu.py … --tensor-parallel 2    # two stages of two ranks

Ranks take the visible GPUs in turn; on a shared one they pass hidden states by CUDA IPC, between
GPUs by NCCL. Prints a digest of the log-likelihoods, which is the same for any number of ranks,
but for those that share matrices: there each has the same random numbers in its part.
"""

import hashlib
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import click
import numpy as np
from one_line import one_line

from cupyllama.bench.shapes import SHAPES, model_config, random_stage
from cupyllama.checkpoint.stages import split_layers
from cupyllama.evaluate import ChoiceScores, plan
from cupyllama.parallel import pipeline
from cupyllama.parallel.devices import choose_device, storage_dtype
from cupyllama.parallel.simulate import simulate
from cupyllama.parallel.world import open_world
from cupyllama.provenance import versions
from cupyllama.sizing import DEFAULT_TOKENS
from cupyllama.tasks.conventions import CONVENTIONS, token_rows
from cupyllama.tasks.files import load_task
from cupyllama.tensor_parallel import check_tensor_parallel, part_of
from cupyllama.tokenizer import load_tokenizer
from cupyllama.trace import busy_seconds


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-7b")
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--questions", default=1000)
@click.option("--replicas", default=1)
@click.option("--tensor-parallel", default=1)
@click.option("--dtype", default="float16")
@click.option("--quantize", type=click.Choice(["fp8", "int8"]))
@click.option("--micro-batch-tokens", default=DEFAULT_TOKENS)
@click.option("--repeats", default=2)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@one_line()
def main(
    shape,
    data,
    tokenizer,
    questions,
    replicas,
    tensor_parallel,
    dtype,
    quantize,
    micro_batch_tokens,
    repeats,
    json_path,
):
    """Time evaluations, all ranks together."""
    world, config = open_world(), model_config(shape)
    with world.together():
        device = choose_device("cuda", world.local_rank, world.local_size)[0]
    check_tensor_parallel(config, tensor_parallel)
    grid = pipeline.make_grid(world, replicas, tensor_parallel)
    own = part_of(config, grid.tensor_share)
    everything = load_task(data, "lm-eval").questions
    spread = [everything[i * len(everything) // questions] for i in range(questions)]
    tokens = load_tokenizer(tokenizer.parent, tokenizer)
    rows = token_rows(spread, tokens, CONVENTIONS["lm-eval"], True, config.max_length)
    layers = split_layers(config, grid.stages)[grid.stage]
    batches = plan(rows.rows, micro_batch_tokens, device.ops)
    storage = storage_dtype(dtype)
    group = pipeline.connect_group(world, grid, device, own)
    stage = random_stage(own, storage, device.ops, rows.longest, layers, quantize, group)
    places = world.allgather(device.place)
    line = pipeline.connect(world, grid, stage, device, batches, config, storage)

    def run(some) -> tuple[float, ChoiceScores]:
        scores = ChoiceScores.empty(len(rows.rows), micro_batch_tokens)
        world.allgather(None)
        begin = time.perf_counter()
        pipeline.run(world, grid, line, some, scores.add)
        world.allgather(None)
        return time.perf_counter() - begin, scores

    run(batches[: 2 * grid.stages * replicas])  # compiles, connects, warms the card
    seconds = []
    for _ in range(repeats):
        line.spans.clear()
        elapsed, scores = run(batches)
        seconds.append(elapsed)
    mine = len(grid.share(batches))
    stages = world.allgather(busy_seconds(line.spans) / max(mine, 1))
    links = world.allgather(line.link_seconds)
    if world.rank == 0:
        assert scores.done.all() and np.isfinite(scores.loglikelihoods).all()
        median = statistics.median(seconds)
        digest = hashlib.sha256(scores.loglikelihoods.tobytes()).hexdigest()
        # A rank of each stage. `line` stays: NCCL's communicators wait for their peers to end.
        ranks = range(0, grid.stages * tensor_parallel, tensor_parallel)
        links = [links[rank] or 0.0 for rank in ranks[1:]]
        simulated = simulate([stages[rank] for rank in ranks], links, mine).seconds
        result = {
            "bench": "pipeline_gpu",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": device.name,
            "gpus": len(set(places)),
            "versions": versions(device),
            "shape": shape,
            "dtype": dtype,
            "quantize": quantize,
            "questions": questions,
            "ranks": world.size,
            "replicas": replicas,
            "tensor_parallel": tensor_parallel,
            "micro_batch_tokens": micro_batch_tokens,
            "micro_batches": len(batches),
            "seconds": seconds,
            "questions_per_second": questions / median,
            "stage_seconds": stages,
            "link_seconds": links,
            "bubble": 1 - sum(stages) * mine / (world.size * median),
            "simulated_seconds": simulated if len(set(places)) == world.size else None,
            "digest": digest,
        }
        print(
            f" > {shape} {quantize or dtype} "
            f"({world.size} ranks, {replicas} replicas, {tensor_parallel} tensor-parallel, "
            f"{result['gpus']} GPUs): "
            f"{questions / median:6.1f} questions/s | {median:.2f} s, "
            f"simulated {result['simulated_seconds'] or float('nan'):.2f} | "
            f"bubble {result['bubble']:.3f} | digest {digest[:12]}",
            flush=True,
        )
        if json_path is not None:
            json_path.write_text(json.dumps(result, indent=2) + "\n")
    world.close()


if __name__ == "__main__":
    main()
