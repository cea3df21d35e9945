"""The pipeline's schedule on paper: what a run takes, from the times of its stages and links."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cupyllama.parallel.channels import SLOTS


@dataclass(frozen=True)
class Simulation:
    """A run of one pipeline, or of several side by side."""

    seconds: float
    busy: list[float]  # seconds that each stage of each pipeline computes

    @property
    def bubble(self) -> float:
        """The share of all stages' time in which they have nothing to compute."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def side_by_side(runs: Iterable[Simulation]) -> Simulation:
    """Pipelines that begin together, as one run: it ends with the last of them."""
    runs = list(runs)
    return Simulation(
        max(run.seconds for run in runs), [seconds for run in runs for seconds in run.busy]
    )


def simulate(
    stage_seconds: Sequence[float], link_seconds: Sequence[float], micro_batches: int
) -> Simulation:
    """Run the schedule of `evaluate.forward_all` and the channels.

    A stage computes a micro-batch once it has arrived; it leaves once it is computed and the link
    is free, and arrives once the receiver's buffer of SLOTS micro-batches ago has been sent on.

    Args:
        stage_seconds: of one micro-batch on each stage.
        link_seconds: of one micro-batch between a stage and the next, one fewer.
    """
    stages = len(stage_seconds)
    computed = [0.0] * stages  # when each stage was done with its last micro-batch
    link_free = [0.0] * stages
    left: list[list[float]] = [[] for _ in range(stages)]  # when each micro-batch left the stage
    for number in range(micro_batches):
        arrived = 0.0
        for stage in range(stages):
            reused = left[stage][number - SLOTS] if number >= SLOTS else 0.0
            if stage:
                begin = max(arrived, link_free[stage - 1], reused)
                arrived = link_free[stage - 1] = begin + link_seconds[stage - 1]
                left[stage - 1].append(arrived)
            computed[stage] = max(arrived, computed[stage]) + stage_seconds[stage]
            arrived = computed[stage]
        left[-1].append(computed[-1])
    busy = [seconds * micro_batches for seconds in stage_seconds]
    return Simulation(max(computed, default=0.0), busy)
