"""How hidden states pass from one stage to the next, without GPUs: MPI and NumPy arrays.

A channel of any kind has two ends. The receiving one is told in advance how many tokens each
micro-batch has, so that the next one can be on its way while this one is computed.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cupyllama.parallel.world import wait

HIDDEN_TAG = 1
# Micro-batches that may lie between two stages: one is used while the next is under way.
SLOTS = 2


@dataclass(frozen=True)
class Departure:
    """Hidden states on their way."""

    wait: Callable[[], None]  # until they have left; keeps them alive
    event: Any = None  # on a GPU: after it, their memory may be written


class Inbox(Protocol):
    """The end that receives."""

    def receive(self, tokens: int) -> Any:
        """The hidden states of the next micro-batch: (tokens, hidden), the caller's to change."""
        ...

    def release(self, departure: Departure | None) -> None:
        """What was received last is used up: after `departure`, or the work queued so far."""
        ...


class Outbox(Protocol):
    """The end that sends."""

    def send(self, hidden: Any) -> Departure:
        """Start to send (tokens, hidden)."""
        ...


class MPIInbox:
    """Receives NumPy arrays."""

    def __init__(
        self, comm: Any, source: int, tokens: Sequence[int], hidden_size: int, dtype: np.dtype
    ):
        self._comm, self._source = comm, source
        self._shapes = deque((count, hidden_size) for count in tokens)
        self._dtype = dtype
        self._expected: deque[tuple[np.ndarray, Any]] = deque()
        for _ in range(SLOTS):
            self._expect()

    def _expect(self) -> None:
        if self._shapes:
            array = np.empty(self._shapes.popleft(), self._dtype)
            request = self._comm.Irecv(as_bytes(array), self._source, HIDDEN_TAG)
            self._expected.append((array, request))

    def receive(self, tokens: int) -> np.ndarray:
        array, request = self._expected.popleft()
        assert len(array) == tokens, f"{len(array)} tokens where {tokens} were expected"
        wait(request)
        self._expect()
        return array

    def release(self, departure: Departure | None) -> None:
        """Every micro-batch has an array of its own."""


class MPIOutbox:
    """Sends NumPy arrays."""

    def __init__(self, comm: Any, target: int):
        self._comm, self._target = comm, target

    def send(self, hidden: np.ndarray) -> Departure:
        request = self._comm.Isend(as_bytes(hidden), self._target, HIDDEN_TAG)
        return Departure(lambda kept=hidden: wait(request))


def as_bytes(array: np.ndarray) -> np.ndarray:
    """MPI knows neither float16 nor bfloat16."""
    return array.reshape(-1).view(np.uint8)
