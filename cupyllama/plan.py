"""What a run would do, as far as it can be told without touching a device."""

from typing import TYPE_CHECKING

from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.checkpoint.stages import head_layers
from cupyllama.config import ModelConfig
from cupyllama.evaluate import plan
from cupyllama.ops import reference
from cupyllama.parallel.devices import gpu_dtype, storage_dtype
from cupyllama.parallel.pipeline import Grid
from cupyllama.parallel.simulate import simulate
from cupyllama.sizing import DEFAULT_TOKENS, activation_bytes

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
    size = options.micro_batch_tokens or max(DEFAULT_TOKENS, rows.longest)
    batches = plan(rows.rows, size, reference)
    computed = sum(len(batch.token_ids) for batch in batches)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if options.device == "cpu" else gpu_dtype(config.dtype)
    activations = activation_bytes(config, size, dtype, reference.LOGIT_CHUNK)
    lines = [
        f"{questions.task.name}: {len(questions.asked):,} questions, {len(rows.rows):,} rows "
        f"of up to {rows.longest:,} tokens, {rows.truncated:,} of them truncated",
        f"{rows.tokens_asked:,} tokens asked, {computed:,} computed "
        f"({rows.tokens_asked / max(computed, 1):.2f} times fewer)",
        f"{len(batches):,} micro-batches of {size:,} tokens, {activations / 1e9:.2f} GB of "
        f"activations in {dtype}",
    ]
    for rank in range(grid.replicas * grid.stages):
        layers = split[rank % grid.stages]
        weights = stage_bytes(config, layers, storage_dtype(dtype), quantize)
        share = len(range(rank // grid.stages, len(batches), grid.replicas))
        lines.append(
            f"rank {rank}: layers {layers.start} to {layers.stop - 1}, {weights / 1e9:.2f} GB of "
            f"weights, {share:,} micro-batches"
        )
    if grid.stages > 1:
        costs = [float(len(layers)) for layers in split]
        costs[-1] += head_layers(config)
        share = -(-len(batches) // grid.replicas)
        run = simulate(costs, [0.0] * (grid.stages - 1), share)
        lines.append(f"bubble {100 * run.bubble:.1f} %, if links cost nothing")
    return "\n".join(lines)
