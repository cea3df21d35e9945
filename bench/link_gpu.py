"""The channel between two stages beside NCCL's own send and receive, of as many bytes.

    mpirun -n 2 python bench/link_gpu.py --tokens 8192 --hidden-size 6656 --json out.json

Each of two ranks needs a GPU of its own. The channel is what the pipeline has: hidden states go
from and to memory of the model, with the events that keep computing and copying apart.
"""

import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import click
import cupy
import numpy as np
from cupy.cuda import nccl
from one_line import one_line

from cupyllama.parallel.cuda_channels import NCCLInbox, NCCLOutbox
from cupyllama.parallel.devices import choose_device
from cupyllama.parallel.world import World, open_world
from cupyllama.provenance import versions

_WARM = 3


@click.command()
@click.option("--tokens", default=8192)
@click.option("--hidden-size", default=6656)
@click.option("--repeats", default=20)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@one_line()
def main(tokens, hidden_size, repeats, json_path):
    """Messages from rank 0 to rank 1, each way in turn."""
    world = open_world()
    with world.together():
        device = choose_device("cuda", world.local_rank, world.local_size)[0]
    places = world.allgather(device.place)
    if len(set(places)) != 2:
        raise click.UsageError("start two ranks, each with a GPU of its own: mpirun -n 2")
    hidden = cupy.ones((tokens, hidden_size), np.float16)
    # Both communicators live until the process ends: one that is destroyed waits for its peer.
    ways = {"channel": channel(world, hidden, repeats), "nccl": plain(world, hidden)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_WARM + repeats):
        for name, message in ways.items():
            world.allgather(None)
            begin = time.perf_counter()
            message()
            if turn >= _WARM:
                seconds[name].append(time.perf_counter() - begin)
    received = world.allgather(seconds)[1]
    if world.rank == 0:
        medians = {name: statistics.median(values) for name, values in received.items()}
        result = {
            "bench": "link_gpu",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": device.name,
            "versions": versions(device),
            "tokens": tokens,
            "hidden_size": hidden_size,
            "bytes": hidden.nbytes,
            "seconds": received,
            "bytes_per_second": {name: hidden.nbytes / value for name, value in medians.items()},
            "channel_of_nccl": medians["nccl"] / medians["channel"],
        }
        for name, value in medians.items():
            rate = hidden.nbytes / value / 1e9
            print(
                f" > {name}: {hidden.nbytes / 1e6:.0f} MB in {1e3 * value:.3f} ms | {rate:.0f} GB/s"
            )
        if json_path is not None:
            json_path.write_text(json.dumps(result, indent=2) + "\n")
    world.close()


def channel(world: World, hidden: cupy.ndarray, repeats: int) -> Callable[[], None]:
    """A message by the pipeline's channel, until it is there."""
    tokens, hidden_size = hidden.shape
    if world.rank == 0:
        outbox = NCCLOutbox(world.comm, 1, hidden_size, hidden.dtype)
        return lambda: outbox.send(hidden).wait()
    sizes = [tokens] * (_WARM + repeats)
    inbox = NCCLInbox(world.comm, 0, sizes, hidden_size, hidden.dtype)

    def receive() -> None:
        inbox.receive(tokens)
        inbox.release(None)
        cupy.cuda.get_current_stream().synchronize()

    return receive


def plain(world: World, hidden: cupy.ndarray) -> Callable[[], None]:
    """A message by NCCL alone."""
    identity = world.allgather(nccl.get_unique_id() if world.rank == 0 else None)[0]
    communicator = nccl.NcclCommunicator(2, identity, world.rank)
    pass_on = communicator.send if world.rank == 0 else communicator.recv
    stream = cupy.cuda.Stream(non_blocking=True)

    def message() -> None:
        pass_on(hidden.data.ptr, hidden.nbytes, nccl.NCCL_INT8, 1 - world.rank, stream.ptr)
        stream.synchronize()

    return message


if __name__ == "__main__":
    main()
