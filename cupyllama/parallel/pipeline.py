"""Several ranks score together: replicas of a pipeline, each a line of stages.

A stage has `tensor_parallel` neighbouring ranks, which share its matrices and all have the same
hidden states: each passes them on to its like in the next stage, so that there are as many lines
side by side. Stages follow one another within a replica; micro-batch i goes through replica
`i % replicas`. Every rank derives its work from the same files, so only hidden states and results
cross the wire. Rank 0 collects the results.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cupyllama.config import ModelConfig, Share
from cupyllama.errors import DeviceError, UsageError
from cupyllama.evaluate import Line, forward_all
from cupyllama.families import Stage
from cupyllama.packing import MicroBatch
from cupyllama.parallel.channels import MPIInbox, MPIOutbox
from cupyllama.parallel.devices import Device
from cupyllama.parallel.group import Exchange, Group, MPIExchange
from cupyllama.parallel.world import World, wait

_RESULT_TAG = 100
# Rank 0 looks for results this often once its own stage has nothing left to do.
_POLL = 1e-3


@dataclass(frozen=True)
class Grid:
    """Who does what."""

    replicas: int
    stages: int
    rank: int
    tensor_parallel: int = 1

    @property
    def replica(self) -> int:
        return self.rank // (self.stages * self.tensor_parallel)

    @property
    def stage(self) -> int:
        return self.rank // self.tensor_parallel % self.stages

    @property
    def tensor_rank(self) -> int:
        """The part of the stage's matrices that this rank has."""
        return self.rank % self.tensor_parallel

    @property
    def tensor_share(self) -> Share | None:
        """That part; None where it is all of them."""
        return Share(self.tensor_rank, self.tensor_parallel) if self.tensor_parallel > 1 else None

    @property
    def group(self) -> range:
        """The ranks that share the stage's matrices with this one, and this one."""
        first = self.rank - self.tensor_rank
        return range(first, first + self.tensor_parallel)

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def share(self, batches: Sequence[MicroBatch]) -> list[tuple[int, MicroBatch]]:
        """The numbered micro-batches of this rank's replica."""
        return list(enumerate(batches))[self.replica :: self.replicas]


def make_grid(world: World, replicas: int, tensor_parallel: int = 1) -> Grid:
    """Raises UsageError where the ranks cannot be divided evenly."""
    if world.size % (replicas * tensor_parallel):
        if tensor_parallel == 1:
            raise UsageError(
                f"{world.size} ranks cannot be {replicas} replicas of equal size",
                "Start a multiple of --replicas ranks.",
            )
        raise UsageError(
            f"{world.size} ranks cannot be {replicas} replicas of stages of {tensor_parallel}",
            "Start a multiple of --replicas × --tensor-parallel ranks: "
            f"mpirun -n {replicas * tensor_parallel} cupyllama …",
        )
    stages = world.size // (replicas * tensor_parallel)
    return Grid(replicas, stages, world.rank, tensor_parallel)


def connect_group(
    world: World,
    grid: Grid,
    device: Device,
    config: ModelConfig,
    ops: ModuleType | None = None,
) -> Group | None:
    """What the ranks of a stage compute together; None for one alone. All ranks call it.

    Args:
        config: of the rank, as `ModelConfig.part` made it.
        ops: in place of the device's own.
    """
    if grid.tensor_parallel == 1:
        return None
    places = world.allgather(device.place)
    return Group(ops or device.ops, config, exchange_among(world, grid.group, places, device))


def exchange_among(
    world: World, ranks: Sequence[int], places: Sequence[str], device: Device
) -> Exchange:
    """How some ranks, all of which call it, exchange arrays.

    Each on a GPU of its own: NCCL. Else MPI, from and to the host's memory where they share GPUs:
    NCCL refuses two ranks on one.

    Args:
        places: of every rank's device.
    """
    if device.kind == "cpu":
        return MPIExchange(world.comm, ranks)
    from cupyllama.parallel import cuda_group

    own = {places[rank] for rank in ranks}
    kind = cuda_group.HostExchange if len(own) < len(ranks) else cuda_group.NCCLExchange
    return kind(world.comm, ranks)


def connect(
    world: World,
    grid: Grid,
    stage: Stage,
    device: Device,
    batches: Sequence[MicroBatch],
    config: ModelConfig,
    dtype: np.dtype,
) -> Line:
    """The channels to this rank's neighbours. All ranks call it; each pair chooses its kind.

    Different GPUs: NCCL, which refuses two ranks on one GPU. The same GPU: CUDA IPC. Else MPI.
    """
    places = world.allgather(device.place)
    line = Line(stage)
    # Ranks that wait for one another within a stage cannot take turns.
    if device.kind == "cuda" and len(set(places)) < len(places) and grid.tensor_parallel == 1:
        line.turn = _shared_turn(world, places)
    tokens = [len(batch.token_ids) for _, batch in grid.share(batches)]
    tokens = 2 * tokens[:1] + tokens  # two more at first, to measure the link
    shape = (max(tokens, default=0), config.hidden_size, dtype)
    # Left before right: a chain of pairs then connects from its first rank on, and cannot lock.
    if not grid.is_first:
        peer = world.rank - grid.tensor_parallel
        line.inbox = _inbox(world.comm, peer, places[peer], device, tokens, shape)
    if not grid.is_last:
        peer = world.rank + grid.tensor_parallel
        line.outbox = _outbox(world.comm, peer, places[peer], device, shape)
    line.link_seconds = _measure_link(world, line, tokens[:1], config.hidden_size, dtype)
    return line


def _measure_link(
    world: World, line: Line, tokens: list[int], hidden_size: int, dtype: np.dtype
) -> float | None:
    """Seconds that a micro-batch takes from the stage before; none on a first stage.

    This is also the message at which NCCL connects, so it is sent twice, and the second counts.
    """
    ops, seconds = line.stage.ops, None
    if world.size == 1:
        return None
    for _ in range(2):
        world.allgather(None)  # of all ranks, those of a replica without micro-batches too
        if not tokens:
            continue
        hidden = ops.empty((tokens[0], hidden_size), dtype)
        clock = ops.Clock()
        begin = clock.now()
        departure = line.outbox.send(hidden) if line.outbox else None
        if line.inbox:
            line.inbox.receive(tokens[0])
            line.inbox.release(None)
            mark = clock.mark()
            ops.synchronize()
            seconds = clock.seconds(mark) - begin
        if departure:
            departure.wait()
    return seconds


def _shared_turn(world: World, places: list[str]) -> Any:
    """The lock of the ranks on this rank's GPU. All ranks call it, those alone on theirs too."""
    from cupyllama.parallel.cuda_channels import DeviceTurn

    owner, path = places.index(places[world.rank]), None
    if world.rank == owner:
        file, path = tempfile.mkstemp(prefix="cupyllama-")
        os.close(file)
    turn = DeviceTurn(world.allgather(path)[owner])
    world.allgather(None)  # all have opened it
    if path is not None:
        os.unlink(path)
    return turn


def _inbox(
    comm: Any, peer: int, place: str, device: Device, tokens: list[int], shape: tuple
) -> Any:
    if device.kind == "cpu" or not tokens:
        return MPIInbox(comm, peer, tokens, *shape[1:])
    from cupyllama.parallel import cuda_channels

    kind = cuda_channels.IPCInbox if place == device.place else cuda_channels.NCCLInbox
    return kind(comm, peer, tokens, *shape[1:])


def _outbox(comm: Any, peer: int, place: str, device: Device, shape: tuple) -> Any:
    if device.kind == "cpu" or not shape[0]:
        return MPIOutbox(comm, peer)
    from cupyllama.parallel import cuda_channels

    if place == device.place:
        return cuda_channels.IPCOutbox(comm, peer, *shape)
    return cuda_channels.NCCLOutbox(comm, peer, *shape[1:])


def run(
    world: World,
    grid: Grid,
    line: Line,
    batches: Sequence[MicroBatch],
    on_result: Callable[[MicroBatch, np.ndarray], None],
) -> None:
    """Every micro-batch through its replica; rank 0 is given all results, as they come.

    Raises:
        DeviceError: out of memory; ranks cannot halve a micro-batch without one another.
    """
    collector = _Collector(world, batches, on_result)
    mine = grid.share(batches)
    try:
        outs = forward_all(line, [batch for _, batch in mine])
        for (number, _), out in zip(mine, outs, strict=True):
            if out is not None and grid.tensor_rank == 0:
                collector.put(number, out)
            collector.poll()
    except MemoryError as error:
        raise DeviceError(
            f"out of memory with micro-batches of {len(mine[0][1].token_ids)} tokens",
            "Give a smaller --micro-batch-tokens.",
        ) from error
    collector.finish()


class _Collector:
    """Carries results from the last stages to rank 0."""

    def __init__(
        self,
        world: World,
        batches: Sequence[MicroBatch],
        on_result: Callable[[MicroBatch, np.ndarray], None],
    ):
        self._world, self._batches, self._on_result = world, batches, on_result
        self._missing = len(batches)
        self._sent: list[Any] = []

    def put(self, number: int, out: np.ndarray) -> None:
        """A result of this rank."""
        if self._world.rank == 0:
            self._take(number, out)
        else:
            self._sent.append(self._world.comm.isend((number, out), 0, _RESULT_TAG))

    def poll(self) -> None:
        """On rank 0: take over what has come by now."""
        if self._world.rank != 0 or self._world.size == 1:
            return
        while (message := self._world.comm.improbe(tag=_RESULT_TAG)) is not None:
            self._take(*message.recv())

    def finish(self) -> None:
        """Until rank 0 has everything, and everything of this rank has left."""
        for request in self._sent:
            wait(request)
        while self._world.rank == 0 and self._missing:
            self.poll()
            time.sleep(_POLL)

    def _take(self, number: int, out: np.ndarray) -> None:
        self._missing -= 1
        self._on_result(self._batches[number], out)
