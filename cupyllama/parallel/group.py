"""The ranks that share the matrices of a stage, and what they compute together.

What is exchanged is added up in the order of the ranks, in float32, and rounded once: an element is
the same bits on all of them, and wherever it stands in the batch. NCCL's own all-reduce adds what
of 16 bits there is in 16 bits, and in an order that depends on the place.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from cupyllama.config import ModelConfig, Share
from cupyllama.parallel.channels import as_bytes
from cupyllama.parallel.world import wait
from cupyllama.quantized import Quantized

GROUP_TAG = 50
# A rank waits for others twice in a layer, and they are never far behind.
LONGEST_SLEEP = 200e-6
# Numbers that are exchanged come in runs of so many, which kernels read at once.
_RUN = 8

Array = Any  # numpy.ndarray or cupy.ndarray: whatever `ops` works on


class Exchange(Protocol):
    """How arrays pass between the ranks of a group."""

    def __call__(self, outgoing: Sequence[Array | None], incoming: Sequence[Array | None]) -> None:
        """Send outgoing[r] to rank r, and fill incoming[r] with what that one sends.

        Arrays are contiguous; a rank's own entries are not looked at, and of an empty array there
        is no message.
        """
        ...


class Group:
    """The operations of which each rank computes a part; elsewhere `ops` itself stands for them."""

    def __init__(self, ops: ModuleType, config: ModelConfig, exchange: Exchange):
        """`config`: of the rank, as `ModelConfig.part` made it."""
        assert config.share is not None
        self.ops, self.share = ops, config.share
        self._exchange = exchange
        shares = (Share(rank, config.share.size) for rank in range(config.share.size))
        self._tokens = [share.vocabulary(config.vocab_size) for share in shares]

    @property
    def capturable(self) -> bool:
        """Whether what it does can be part of a CUDA graph: not where the host waits for it."""
        return getattr(self._exchange, "capturable", False)

    def linear(
        self,
        x: Array | Quantized,
        weight: Array | Quantized,
        bias: Array | None = None,
        residual: Array | None = None,
    ) -> Array:
        """x · weightᵀ + bias + residual, each rank having some columns of x and of weight.

        Args:
            bias, residual: the same on all ranks; as `ops.linear` takes them.
        """
        if self.share.rank == 0:
            part = self.ops.linear(x, weight, bias, residual)
        else:
            part = self.ops.linear(x, weight, out_dtype=residual.dtype)
        return self.sum(part)

    def log_probs(
        self, logits: Array, target_start: Array, target_token: Array, out: Array
    ) -> None:
        """As `ops.log_probs`, each rank having the logits of some tokens."""
        parts = self.ops.empty((self.share.size, 4, len(target_token)), np.float32)
        own = parts[self.share.rank]
        first_token = self._tokens[self.share.rank].start
        self.ops.log_probs_part(logits, target_start, target_token, first_token, own)
        self._exchange([own] * self.share.size, list(parts))
        self.ops.join_log_probs(parts, target_start, target_token, out)

    def logits(self, own: Array) -> Array:
        """Of all the vocabulary, on every rank: (rows, own tokens) -> (rows, vocab) float32."""
        shapes = [(len(own), len(tokens)) for tokens in self._tokens]
        parts = [self.ops.empty(shape, own.dtype) for shape in shapes]
        self._exchange([own] * self.share.size, parts)
        parts[self.share.rank] = own
        whole = self.ops.empty((len(own), self._tokens[-1].stop), own.dtype)
        for tokens, part in zip(self._tokens, parts, strict=True):
            whole[:, tokens.start : tokens.stop] = part
        return whole

    def sum(self, x: Array) -> Array:
        """The sum of all ranks' x, in its memory: each adds up one run of numbers, for all."""
        rank, size = self.share.rank, self.share.size
        flat = x.reshape(-1)
        ends = [len(flat) * part // size // _RUN * _RUN for part in range(size)] + [len(flat)]
        runs = [flat[ends[part] : ends[part + 1]] for part in range(size)]
        own = runs[rank]
        received = self.ops.empty((size, len(own)), x.dtype)
        self._exchange(runs, list(received))
        self.ops.sum_parts(own, received, rank)
        self._exchange([own] * size, runs)
        return x


class MPIExchange:
    """NumPy arrays by MPI."""

    def __init__(self, comm: Any, ranks: Sequence[int]):
        """`ranks`: of the group in `comm`, in the group's order."""
        self._comm, self._ranks = comm, ranks

    def __call__(self, outgoing: Sequence[np.ndarray], incoming: Sequence[np.ndarray]) -> None:
        requests = []
        for peer, sent, received in zip(self._ranks, outgoing, incoming, strict=True):
            if peer == self._comm.rank:
                continue
            if received.nbytes:
                requests.append(self._comm.Irecv(as_bytes(received), peer, GROUP_TAG))
            if sent.nbytes:
                requests.append(self._comm.Isend(as_bytes(sent), peer, GROUP_TAG))
        for request in requests:
            wait(request, LONGEST_SLEEP)
