"""What passes between the stages of a model that generates.

Hidden states go from a stage to the next, and what the last one finds to all ranks, for the next
token is fed to the first: stages take turns, and one waits while another computes.
"""

from typing import Any

import numpy as np

from cupyllama.parallel.channels import as_bytes
from cupyllama.parallel.devices import Device
from cupyllama.parallel.group import LONGEST_SLEEP, Exchange
from cupyllama.parallel.pipeline import Grid, exchange_among
from cupyllama.parallel.world import World, wait

Array = Any  # numpy.ndarray or cupy.ndarray


class Links:
    """The ends that one rank has."""

    def __init__(self, world: World, grid: Grid, before: Exchange | None, after: Exchange | None):
        """`before` and `after`: with the ranks that have the same part of neighbouring stages."""
        self.is_first, self.is_last = before is None, after is None
        self._comm, self._before, self._after = world.comm, before, after
        self._root = (grid.stages - 1) * grid.tensor_parallel

    def receive(self, hidden: Array) -> None:
        """Fill (tokens, hidden) with what the stage before sends; not on the first one."""
        nothing = hidden[:0]
        self._before([nothing, nothing], [hidden, nothing])

    def send(self, hidden: Array) -> None:
        """Send (tokens, hidden) to the stage after; not on the last one."""
        nothing = hidden[:0]
        self._after([nothing, hidden], [nothing, nothing])

    def broadcast(self, array: np.ndarray) -> None:
        """Fill the array of every rank, on the host, with that of the last stage's first rank."""
        wait(self._comm.Ibcast(as_bytes(array), self._root), LONGEST_SLEEP)


def connect_links(world: World, grid: Grid, device: Device) -> Links | None:
    """The links of this rank; None where there is one stage. All ranks call it."""
    if grid.stages == 1:
        return None
    places = world.allgather(device.place)
    before = after = None
    # Left before right: a chain of pairs then connects from its first rank on, and cannot lock.
    if not grid.is_first:
        pair = [world.rank - grid.tensor_parallel, world.rank]
        before = exchange_among(world, pair, places, device)
    if not grid.is_last:
        pair = [world.rank, world.rank + grid.tensor_parallel]
        after = exchange_among(world, pair, places, device)
    return Links(world, grid, before, after)
