"""How the decoder layers are shared out among the stages of a pipeline."""

from collections.abc import Sequence

from cupyllama.config import ModelConfig
from cupyllama.errors import UsageError

# Of the tokens computed, those whose logits are wanted: about three quarters when choices are
# scored, the rest being contexts.
HEAD_SHARE = 0.75


def split_layers(
    config: ModelConfig, stages: int, layers_per_stage: Sequence[int] | None = None
) -> list[range]:
    """Contiguous layers for each stage, such that the slowest stage is as fast as can be.

    The last stage has lm_head to compute besides its layers; the embedding costs nothing. Among
    the splits that are equally fast, the most even one is taken.

    Args:
        layers_per_stage: the numbers themselves, where the user knows better.

    Raises:
        UsageError: more stages than layers, or numbers that are not those of the model's layers.
    """
    layers = config.num_hidden_layers
    if stages < 1:
        raise UsageError(f"{stages} stages cannot be", "One stage is the least.")
    if stages > layers:
        raise UsageError(
            f"{stages} stages cannot share the model's {layers} layers",
            f"Give {layers} stages at most.",
        )
    if layers_per_stage is None:
        counts = _balanced(layers, stages, head_layers(config))
    else:
        counts = list(layers_per_stage)
        if len(counts) != stages or sum(counts) != layers or min(counts) < 1:
            raise UsageError(
                f"--layers-per-stage {','.join(map(str, counts))} does not share {layers} layers "
                f"among {stages} stages",
                f"Give {stages} positive numbers whose sum is {layers}.",
            )
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def head_layers(config: ModelConfig) -> float:
    """The cost of lm_head, in decoder layers."""
    return HEAD_SHARE * config.head_parameters / config.layer_parameters


def _balanced(layers: int, stages: int, head: float) -> list[int]:
    def even(count: int) -> list[int]:
        """`count` layers over all stages but the last."""
        return [
            count // (stages - 1) + (stage < count % (stages - 1)) for stage in range(stages - 1)
        ]

    def slowness(counts: list[int]) -> tuple[float, float]:
        costs = [*counts[:-1], counts[-1] + head]
        return max(costs), sum(cost * cost for cost in costs)

    if stages == 1:
        return [layers]
    candidates = ([*even(layers - last), last] for last in range(1, layers - stages + 2))
    return min(candidates, key=slowness)
