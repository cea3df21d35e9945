"""The choice of the next token on a GPU: checks and a launch each; see `sampling_reference`."""

from collections.abc import Sequence

import cupy
import numpy as np

from cupyllama.generation.settings import SamplingSettings
from cupyllama.kernels import definitions, kernel
from cupyllama.ops import sampling_reference
from cupyllama.ops.arrays import check

Array = cupy.ndarray

MOST_LOG_PROBS = 512  # half of the list of select.cuh


class SamplingState(sampling_reference.SamplingState):
    """What is known of the sequence in each row, in device memory."""

    def __init__(self, rows: int, vocab_size: int):
        super().__init__(rows, vocab_size, cupy)
        self._constants = definitions.sampling_constants(vocab_size)

    def put(self, row: int, settings: SamplingSettings, seen_ids: Sequence[int]) -> None:
        """Begin a sequence; see `sampling_reference`."""
        ids = np.asarray(seen_ids, np.int32)
        numbers = (
            np.int32(len(ids)),
            np.int32(row),
            np.float32(settings.temperature),
            np.int32(sampling_reference.bounded_top_k(settings)),
            np.float32(settings.top_p),
            np.float32(settings.repetition_penalty),
            np.uint64(settings.seed),
        )
        arrays = (self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)
        launch = kernel("sampling.cu", "put", **self._constants)
        arguments = (self.seen, *arrays, self.drawn, cupy.asarray(ids), *numbers)
        launch((1,), (self._constants["THREADS"],), arguments)


def sample(logits: Array, rows: Array, state: SamplingState, tokens: Array) -> None:
    """Choose the next token of rows; see `sampling_reference`.

    One launch, which may be captured in a graph.

    Args:
        logits: (n, vocab) float32. The caller gives them up.
        rows: (n,) int32, each row once; -1: nobody's.
        tokens: (rows of the state,) int32; the token is written to that of the row.
    """
    (count, vocab), capacity = logits.shape, len(tokens)
    check(logits, np.float32, (count, vocab))
    check(rows, np.int32, (count,))
    check(tokens, np.int32, (capacity,))
    check(state.seen, np.uint32, (capacity, -(-vocab // 32)))
    if count:
        constants = definitions.sampling_constants(vocab)
        launch = kernel("sampling.cu", "sample", **constants)
        settings = (state.temperature, state.top_k, state.top_p, state.repetition_penalty)
        arguments = (tokens, state.seen, state.drawn, logits, rows, *settings, state.seed)
        launch((count,), (constants["THREADS"],), arguments)


def top_log_probs(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` most likely tokens of each row, the most likely first; see `sampling_reference`.

    Args:
        logits: (rows, vocab) float32.
        count: at most MOST_LOG_PROBS, and at most the vocabulary.

    Returns:
        Their log softmax and the tokens: (rows, count) float32 and int32.
    """
    rows, vocab = logits.shape
    check(logits, np.float32, (rows, vocab))
    assert 1 <= count <= min(vocab, MOST_LOG_PROBS), f"{count=} {vocab=}"
    values, ids = cupy.empty((rows, count), np.float32), cupy.empty((rows, count), np.int32)
    if rows:
        constants = definitions.sampling_constants(vocab)
        launch = kernel("sampling.cu", "top_log_probs", **constants)
        launch((rows,), (constants["THREADS"],), (values, ids, logits, np.int32(count)))
    return values, ids
