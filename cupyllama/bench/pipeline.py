"""`cupyllama bench pipeline`: what a measured run would take on other ranks and hosts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyllama.checkpoint.stages import head_layers, split_layers
from cupyllama.config import ModelConfig
from cupyllama.errors import DataError
from cupyllama.families import config_from_fields
from cupyllama.parallel.devices import storage_dtype
from cupyllama.parallel.simulate import simulate

RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class MeasuredRun:
    """What a results file says of a run."""

    config: ModelConfig
    questions: int
    micro_batches: int
    seconds: float
    layer_seconds: float  # of one micro-batch
    hidden_bytes: int  # of one micro-batch between two stages
    link_seconds: float | None  # of one micro-batch, as measured
    ranks: int


@dataclass(frozen=True)
class Prediction:
    """The same run on `ranks` ranks, one GPU each."""

    ranks: int
    hosts: int
    seconds: float
    questions_per_second: float
    bubble: float


def read_run(path: Path) -> MeasuredRun:
    """A file that `score --output` wrote.

    Raises:
        DataError: it is not one, or of a version that had no ranks in it.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        settings, extra = results["config"], results["cupyllama"]
        config = config_from_fields(settings["model_config"])
        ranks: list[dict[str, Any]] = extra["ranks"]
        if settings.get("tensor_parallel", 1) > 1:
            raise DataError(
                f"{path}: is of stages of {settings['tensor_parallel']} ranks, whose exchanges "
                "say nothing of other numbers",
                "Give the results of a run without --tensor-parallel.",
            )
        first = [rank for rank in ranks if rank["replica"] == 0]
        cost = sum(last - begin for begin, last in (rank["layers"] for rank in first))
        links = [rank["link_seconds"] for rank in ranks if rank["link_seconds"] is not None]
        micro_batches = sum(rank["micro_batches"] for rank in ranks) // len(first)
        tokens = settings["micro_batch_tokens"][0]
        itemsize = storage_dtype(settings["dtype"]).itemsize
        return MeasuredRun(
            config=config,
            questions=sum(entry["effective"] for entry in results["n-samples"].values()),
            micro_batches=micro_batches,
            seconds=extra["seconds"]["evaluating"],
            layer_seconds=sum(rank["stage_seconds"] for rank in first)
            / (cost + head_layers(config)),
            hidden_bytes=tokens * config.hidden_size * itemsize,
            link_seconds=sum(links) / len(links) if links else None,
            ranks=len(ranks),
        )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not a results file: {error!r}", "Give what `cupyllama score --output` wrote."
        ) from error


def predict(
    run: MeasuredRun, ranks_per_host: int, link_gbs: float | None, network_gbs: float
) -> Iterator[Prediction]:
    """The run on 1, 2, 4 … 64 ranks, as far as there are layers for them.

    Args:
        link_gbs: GB/s between the ranks of a host; None: as measured.
        network_gbs: GB/s between hosts.
    """
    measured = run.link_seconds if run.link_seconds is not None else 0.0
    near = measured if link_gbs is None else run.hidden_bytes / (1e9 * link_gbs)
    far = run.hidden_bytes / (1e9 * network_gbs)
    for ranks in RANKS:
        if ranks > run.config.num_hidden_layers:
            return
        split = split_layers(run.config, ranks)
        stages = [len(layers) * run.layer_seconds for layers in split]
        stages[-1] += head_layers(run.config) * run.layer_seconds
        links = [near if rank % ranks_per_host else far for rank in range(1, ranks)]
        simulation = simulate(stages, links, run.micro_batches)
        yield Prediction(
            ranks=ranks,
            hosts=-(-ranks // ranks_per_host),
            seconds=simulation.seconds,
            questions_per_second=run.questions / simulation.seconds,
            bubble=simulation.bubble,
        )
