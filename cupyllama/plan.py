"""What a run would do, as far as it can be told without touching a device."""

from dataclasses import replace
from typing import TYPE_CHECKING

from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.checkpoint.stages import head_layers
from cupyllama.config import ModelConfig
from cupyllama.evaluate import plan
from cupyllama.ops import reference
from cupyllama.parallel.channels import SLOTS
from cupyllama.parallel.devices import gpu_dtype, storage_dtype
from cupyllama.parallel.pipeline import Grid
from cupyllama.parallel.simulate import simulate
from cupyllama.sizing import activation_bytes, default_tokens
from cupyllama.tensor_parallel import part_of

if TYPE_CHECKING:
    from cupyllama.questions import Questions
    from cupyllama.score import ScoreOptions


def describe_plan(
    options: "ScoreOptions",
    config: ModelConfig,
    questions: "Questions",
    split: list[range],
    grid: Grid,
    quantize: str | None,
) -> str:
    """Micro-batches, the layers and bytes of each rank, and the bubble to expect."""
    rows = questions.rows
    ranks = grid.replicas * grid.stages * grid.tensor_parallel
    default = default_tokens("cpu" if options.device == "cpu" else "cuda", ranks)
    size = options.micro_batch_tokens or max(default, rows.longest)
    batches = plan(rows.rows, size, reference)
    computed = sum(len(batch.token_ids) for batch in batches)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if options.device == "cpu" else gpu_dtype(config.dtype)
    own = part_of(config, grid.tensor_share)
    activations = activation_bytes(own, size, dtype, reference.LOGIT_CHUNK, quantize)
    lines = [
        f"{questions.task.name}: {len(questions.asked):,} questions, {len(rows.rows):,} rows "
        f"of up to {rows.longest:,} tokens, {rows.truncated:,} of them truncated",
        f"{rows.tokens_asked:,} tokens asked, {computed:,} computed "
        f"({rows.tokens_asked / max(computed, 1):.2f} times fewer)",
        f"{len(batches):,} micro-batches of {size:,} tokens, {activations / 1e9:.2f} GB of "
        f"activations in {dtype}" + (", as on a GPU" if options.device == "auto" else ""),
    ]
    for rank in range(ranks):
        its = replace(grid, rank=rank)
        layers, own = split[its.stage], part_of(config, its.tensor_share)
        weights = stage_bytes(own, layers, storage_dtype(dtype), quantize)
        part = f", part {its.tensor_rank + 1}/{grid.tensor_parallel}" if its.tensor_share else ""
        peak = weights + activation_bytes(own, size, dtype, reference.LOGIT_CHUNK, quantize)
        if its.stage > 0:
            peak += SLOTS * size * config.hidden_size * storage_dtype(dtype).itemsize  # to receive
        lines.append(
            f"rank {rank}: layers {layers.start} to {layers.stop - 1}{part}, {weights / 1e9:.2f} "
            f"GB of weights, {peak / 1e9:.2f} GB at the peak, {len(its.share(batches)):,} "
            "micro-batches"
        )
    if grid.stages > 1:
        costs = [float(len(layers)) for layers in split]
        costs[-1] += head_layers(config)
        share = -(-len(batches) // grid.replicas)
        run = simulate(costs, [0.0] * (grid.stages - 1), share)
        lines.append(f"bubble {100 * run.bubble:.1f} %, if links cost nothing")
    return "\n".join(lines)
