"""How arrays pass between the ranks of a group that compute on GPUs.

By NCCL, in the order of the stream that computes: the host waits for nothing. Ranks that share a
GPU, which NCCL refuses, go through the host's memory and MPI, and wait for every exchange: that is
for trying things out, at a small part of the speed.
"""

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from cupyllama.parallel.group import GROUP_TAG, MPIExchange


class NCCLExchange:
    """Arrays of GPUs of which each rank has one."""

    capturable = True

    def __init__(self, comm: Any, ranks: Sequence[int]):
        """All ranks of the group make one; `ranks` are theirs in `comm`, in the group's order."""
        from cupy.cuda import nccl

        self._nccl, self._own = nccl, ranks.index(comm.rank)
        if self._own == 0:
            identity = nccl.get_unique_id()
            for peer in ranks[1:]:
                comm.send(identity, peer, GROUP_TAG)
        else:
            identity = comm.recv(source=ranks[0], tag=GROUP_TAG)
        self._communicator = nccl.NcclCommunicator(len(ranks), identity, self._own)
        # NCCL connects at the first message.
        first = cupy.zeros((2, len(ranks), 1), np.uint8)
        self(list(first[0]), list(first[1]))
        cupy.cuda.get_current_stream().synchronize()

    def __call__(self, outgoing: Sequence[cupy.ndarray], incoming: Sequence[cupy.ndarray]) -> None:
        stream, byte = cupy.cuda.get_current_stream().ptr, self._nccl.NCCL_INT8
        self._nccl.groupStart()
        for peer, (sent, received) in enumerate(zip(outgoing, incoming, strict=True)):
            if peer == self._own:
                continue
            if sent.nbytes:
                self._communicator.send(sent.data.ptr, sent.nbytes, byte, peer, stream)
            if received.nbytes:
                self._communicator.recv(received.data.ptr, received.nbytes, byte, peer, stream)
        self._nccl.groupEnd()


class HostExchange(MPIExchange):
    """Arrays of ranks that share GPUs, through the host's memory."""

    def __call__(self, outgoing: Sequence[cupy.ndarray], incoming: Sequence[cupy.ndarray]) -> None:
        arrived = [np.empty(array.shape, array.dtype) for array in incoming]
        copies: dict[int, np.ndarray] = {}  # what goes to all of them is copied once
        for array in outgoing:
            if id(array) not in copies:
                copies[id(array)] = cupy.asnumpy(array)
        super().__call__([copies[id(array)] for array in outgoing], arrived)
        for peer, array, copy in zip(self._ranks, incoming, arrived, strict=True):
            if peer != self._comm.rank and array.nbytes:
                array.set(copy)
