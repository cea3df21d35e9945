"""How hidden states pass between GPUs (NCCL) and between processes that share one (CUDA IPC).

Both ends work on a stream of their own. The receiver has two buffers: while a stage computes on one
of them, in place, the next micro-batch arrives in the other. A buffer is written again only after
what was computed in it has been sent on.
"""

import fcntl
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime

from cupyllama.parallel.channels import HIDDEN_TAG, SLOTS, Departure
from cupyllama.parallel.world import wait

# The device is idle while a message is waited for: look more often than for work on a CPU.
_SLEEP = 100e-6

_FREED_TAG = HIDDEN_TAG + 1
_SETUP_TAG = HIDDEN_TAG + 2


class DeviceTurn:
    """One rank at a time computes on a GPU that several share.

    The GPU would serve them in slices of milliseconds and lose a tenth of its time between them.
    A process that dies leaves the lock to the next.
    """

    def __init__(self, path: str):
        self._file = open(path, "rb")

    def __enter__(self) -> None:
        # What is computed next is there before others are kept waiting: it may need their turns.
        cupy.cuda.get_current_stream().synchronize()
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *error: object) -> None:
        cupy.cuda.get_current_stream().synchronize()
        fcntl.flock(self._file, fcntl.LOCK_UN)


class _Inbox:
    """The receiver's buffers, and the events after which each of them is free."""

    def __init__(self, tokens: Sequence[int], hidden_size: int, dtype: np.dtype):
        self._arrays = [cupy.empty((max(tokens), hidden_size), dtype) for _ in range(SLOTS)]
        self._free: list[Any] = [None] * SLOTS
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._received = 0

    def receive(self, tokens: int) -> cupy.ndarray:
        slot = self._received % SLOTS
        if self._free[slot] is not None:
            self._stream.wait_event(self._free[slot])
        hidden = self._arrays[slot][:tokens]
        self._fill(hidden, slot)
        self._received += 1
        cupy.cuda.get_current_stream().wait_event(_record(self._stream))
        return hidden

    def release(self, departure: Departure | None) -> None:
        event = None if departure is None else departure.event
        slot = (self._received - 1) % SLOTS
        self._free[slot] = event or _record(cupy.cuda.get_current_stream())

    def _fill(self, array: cupy.ndarray, slot: int) -> None:
        raise AssertionError("a kind of channel fills the buffer")


class NCCLInbox(_Inbox):
    """Receives from another GPU."""

    def __init__(
        self, comm: Any, source: int, tokens: Sequence[int], hidden_size: int, dtype: np.dtype
    ):
        super().__init__(tokens, hidden_size, dtype)
        self._nccl = _nccl_pair(comm, source, is_sender=False)
        self._fill(self._arrays[0][:1], 0)  # NCCL connects at the first message

    def _fill(self, array: cupy.ndarray, slot: int) -> None:
        self._nccl.recv(array.data.ptr, array.nbytes, _nccl_byte(), 0, self._stream.ptr)


class NCCLOutbox:
    """Sends to another GPU."""

    def __init__(self, comm: Any, target: int, hidden_size: int, dtype: np.dtype):
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._nccl = _nccl_pair(comm, target, is_sender=True)
        self.send(cupy.zeros((1, hidden_size), dtype)).wait()

    def send(self, hidden: cupy.ndarray) -> Departure:
        self._stream.wait_event(_record(cupy.cuda.get_current_stream()))
        self._nccl.send(hidden.data.ptr, hidden.nbytes, _nccl_byte(), 1, self._stream.ptr)
        sent = _record(self._stream)
        return Departure(lambda kept=hidden: sent.synchronize(), sent)


def _nccl_pair(comm: Any, peer: int, is_sender: bool) -> Any:
    """A communicator of two: the sender is its rank 0. Waits for the peer."""
    from cupy.cuda import nccl

    if is_sender:
        identity = nccl.get_unique_id()
        comm.send(identity, peer, _SETUP_TAG)
    else:
        identity = comm.recv(source=peer, tag=_SETUP_TAG)
    return nccl.NcclCommunicator(2, identity, 0 if is_sender else 1)


def _nccl_byte() -> int:
    """Hidden states go as bytes: NCCL's bfloat16 has no name in CuPy."""
    from cupy.cuda import nccl

    return nccl.NCCL_INT8


class IPCOutbox:
    """Sends to another process on the same GPU, through two buffers that both have mapped.

    `streamWaitEvent` looks at what an event recorded last, so each side is told by a message when
    the other has recorded.
    """

    def __init__(self, comm: Any, target: int, tokens: int, hidden_size: int, dtype: np.dtype):
        self._comm, self._target = comm, target
        self._stream = cupy.cuda.Stream(non_blocking=True)
        nbytes = tokens * hidden_size * dtype.itemsize
        # Plain allocations: a block of CuPy's pool is only a part of what a handle names.
        self._slots = [cupy.cuda.Memory(nbytes) for _ in range(SLOTS)]
        self._filled = [_interprocess_event() for _ in range(SLOTS)]
        handles = [runtime.ipcGetMemHandle(slot.ptr) for slot in self._slots]
        events = [runtime.ipcGetEventHandle(event.ptr) for event in self._filled]
        comm.send((handles, events), target, _SETUP_TAG)
        freed = comm.recv(source=target, tag=_SETUP_TAG)
        self._freed = [runtime.ipcOpenEventHandle(handle) for handle in freed]
        self._sent = 0

    def send(self, hidden: cupy.ndarray) -> Departure:
        slot = self._sent % SLOTS
        self._stream.wait_event(_record(cupy.cuda.get_current_stream()))
        if self._sent >= SLOTS:
            _receive_token(self._comm, self._target, _FREED_TAG)
            runtime.streamWaitEvent(self._stream.ptr, self._freed[slot])
        runtime.memcpyAsync(
            self._slots[slot].ptr,
            hidden.data.ptr,
            hidden.nbytes,
            runtime.memcpyDeviceToDevice,
            self._stream.ptr,
        )
        self._filled[slot].record(self._stream)
        sent = _record(self._stream)
        self._sent += 1
        token = self._comm.Isend(_token(), self._target, HIDDEN_TAG)

        def left(kept: cupy.ndarray = hidden) -> None:
            wait(token)
            sent.synchronize()

        return Departure(left, sent)


class IPCInbox(_Inbox):
    """Receives from another process on the same GPU."""

    def __init__(
        self, comm: Any, source: int, tokens: Sequence[int], hidden_size: int, dtype: np.dtype
    ):
        super().__init__(tokens, hidden_size, dtype)
        self._comm, self._source = comm, source
        handles, events = comm.recv(source=source, tag=_SETUP_TAG)
        self._slots = [runtime.ipcOpenMemHandle(handle) for handle in handles]
        self._filled = [runtime.ipcOpenEventHandle(handle) for handle in events]
        self._freed = [_interprocess_event() for _ in range(SLOTS)]
        handles = [runtime.ipcGetEventHandle(event.ptr) for event in self._freed]
        comm.send(handles, source, _SETUP_TAG)
        self._freeing: list[Any] = []

    def _fill(self, array: cupy.ndarray, slot: int) -> None:
        _receive_token(self._comm, self._source, HIDDEN_TAG)
        runtime.streamWaitEvent(self._stream.ptr, self._filled[slot])
        runtime.memcpyAsync(
            array.data.ptr,
            self._slots[slot],
            array.nbytes,
            runtime.memcpyDeviceToDevice,
            self._stream.ptr,
        )
        self._freed[slot].record(self._stream)
        self._freeing = [request for request in self._freeing if not request.Test()]
        self._freeing.append(self._comm.Isend(_token(), self._source, _FREED_TAG))


def _interprocess_event() -> cupy.cuda.Event:
    return cupy.cuda.Event(disable_timing=True, interprocess=True)


def _record(stream: Any) -> cupy.cuda.Event:
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event


def _token() -> np.ndarray:
    return np.zeros(1, np.uint8)


def _receive_token(comm: Any, source: int, tag: int) -> None:
    wait(comm.Irecv(_token(), source, tag), _SLEEP)
