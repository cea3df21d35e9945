"""What one rank of a run has before it computes: a part of the model, a device, and a load."""

from collections.abc import Mapping, Sequence
from typing import Any

from cupyllama.background import BackgroundLoad
from cupyllama.checkpoint.quantization import check_device, choose_quantization
from cupyllama.checkpoint.slices import part_of_checkpoint
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.checkpoint.stages import split_layers
from cupyllama.config import load_config
from cupyllama.errors import DataError
from cupyllama.parallel.devices import choose_device, choose_dtype
from cupyllama.parallel.pipeline import make_grid
from cupyllama.parallel.world import World
from cupyllama.printing import note
from cupyllama.tensor_parallel import check_tensor_parallel, part_of


class Rank:
    """One rank's part of a run, as far as all commands have it in common.

    What a step may raise it raises before it waits for another rank: `World.together` and
    `check_same` are where ranks meet.
    """

    def __init__(self, options: Any, world: World):
        """`options`: of the command, with those that choose a model and how it is computed."""
        self.options, self.world = options, world
        self.is_printer = world.rank == 0 and not options.quiet
        self.load: BackgroundLoad | None = None

    def say(self, text: str) -> None:
        """One line on stderr, from rank 0 alone."""
        if self.is_printer:
            note(text)

    def choose_part(self, replicas: int = 1) -> None:
        """Which layers it has, and what of them; touches no device."""
        options, world = self.options, self.world
        self.config = load_config(options.model)
        self.grid = make_grid(world, replicas, options.tensor_parallel)
        check_tensor_parallel(self.config, options.tensor_parallel)
        self.own_config = part_of(self.config, self.grid.tensor_share)
        self.quantize = choose_quantization(options.quantize, options.model, self.own_config)
        self.split = split_layers(self.config, self.grid.stages, options.layers_per_stage)
        self.layers = self.split[self.grid.stage]

    def begin_load(self) -> None:
        """The device, and weights on their way to it."""
        options, world = self.options, self.world
        self.device, reason = choose_device(options.device, world.local_rank, world.local_size)
        if reason and options.device == "auto":
            self.say(f"no GPU ({reason}); computing on the CPU")
        check_device(self.quantize, self.device)
        self.dtype = choose_dtype(options.dtype, self.config.dtype, self.device)
        self.checkpoint = open_checkpoint(options.model)
        share = self.grid.tensor_share
        self.own_checkpoint = part_of_checkpoint(self.checkpoint, self.config, share)
        self.load = BackgroundLoad(
            self.own_checkpoint,
            self.own_config,
            self.layers,
            self.dtype,
            self.device,
            self.is_printer,
            self.quantize,
        )

    def close(self) -> None:
        """End what an error may have left open."""
        if self.load is not None:
            self.load.cancel()


def check_same(works: Sequence[Mapping[str, Any]]) -> None:
    """What every rank has before it is the same for all.

    Raises:
        DataError: naming a rank and what differs.
    """
    for rank, other in enumerate(works):
        differing = [what for what in works[0] if other[what] != works[0][what]]
        if differing:
            raise DataError(
                f"rank {rank} and rank 0 differ in: {', '.join(differing)}",
                "Every host needs the same files at the same paths, and equal devices.",
            )
