"""The run itself: micro-batches through a stage, log-probabilities back, a result a choice."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cupyllama.errors import DeviceError
from cupyllama.model.llama import Stage
from cupyllama.packing import MicroBatch, TokenRow, pack

# Micro-batches given to the device before the oldest is waited for: launches stay ahead of it.
IN_FLIGHT = 2


@dataclass(frozen=True)
class ChoiceScores:
    """What the model says of every choice, in the order of the rows."""

    loglikelihoods: np.ndarray  # (choices,) float64, sum over the choice's tokens
    is_greedy: np.ndarray  # (choices,) bool: every token was the most likely one
    micro_batch_tokens: list[int]  # more than one entry: memory ran out and the size was halved
    tokens_computed: int


def plan(rows: Sequence[TokenRow], micro_batch_tokens: int, ops) -> list[MicroBatch]:
    """The micro-batches of a run on the device whose operations are `ops`."""
    return list(pack(rows, micro_batch_tokens, ops.LOGIT_CHUNK, pad=ops.FIXED_SHAPES))


def evaluate(
    stage: Stage,
    rows: Sequence[TokenRow],
    batches: list[MicroBatch],
    micro_batch_tokens: int,
    on_choices: Callable[[np.ndarray], None] = lambda choices: None,
    on_halved: Callable[[int], None] = lambda tokens: None,
) -> ChoiceScores:
    """Score every row. A value that is no number is left in the result for the caller to find.

    A micro-batch that does not fit the device's memory is cut in half, and so are all after it.

    Args:
        batches: `plan(rows, micro_batch_tokens, stage.ops)`.
        on_choices: called with the choices of each micro-batch that is done.
        on_halved: called with the new size where memory ran out.

    Raises:
        DeviceError: not even the longest row fits.
    """
    loglikelihoods = np.zeros(len(rows))
    is_greedy = np.ones(len(rows), bool)
    sizes, computed = [micro_batch_tokens], 0
    while batches:
        done = 0
        try:
            for batch, out in _forward_all(stage, batches):
                choice = batch.target_choice
                # bincount adds in order: the same sum whatever else is in the micro-batch
                loglikelihoods += np.bincount(choice, out[0].astype(np.float64), len(rows))
                is_greedy[choice[out[1] == 0]] = False
                computed += len(batch.token_ids)
                done += 1
                on_choices(np.unique(choice))
            break
        except MemoryError as error:
            stage.ops.release_memory()
            left = np.unique(np.concatenate([b.target_choice for b in batches[done:]]))
            remaining = [rows[choice] for choice in left]
            longest = max(len(row.token_ids) - 1 for row in remaining)
            if sizes[-1] <= longest:
                raise DeviceError(
                    f"out of memory with micro-batches of {sizes[-1]} tokens",
                    "The longest row needs that many. A device with more memory is needed.",
                ) from error
            sizes.append(max(sizes[-1] // 2, longest))
            on_halved(sizes[-1])
            batches = plan(remaining, sizes[-1], stage.ops)
    return ChoiceScores(loglikelihoods, is_greedy, sizes, computed)


def first_broken(stage: Stage, rows: Sequence[TokenRow], suspects: np.ndarray) -> int | None:
    """The first suspect whose log-likelihood is not a number when its row is alone.

    In company, a NaN also reaches the rows that share a prefix with the row it belongs to: masked
    keys weigh 0, and 0 · NaN is NaN.
    """
    for choice in suspects:
        row = TokenRow(rows[choice].token_ids, rows[choice].first_target, 0)
        size = len(row.token_ids) - 1
        scores = evaluate(stage, [row], plan([row], size, stage.ops), size)
        if not np.isfinite(scores.loglikelihoods[0]):
            return int(choice)
    return None


def _forward_all(
    stage: Stage, batches: Sequence[MicroBatch]
) -> Iterator[tuple[MicroBatch, np.ndarray]]:
    """Each micro-batch with its log-probabilities on the host, a few under way at a time."""
    ops = stage.ops
    under_way: deque = deque()
    out_of_memory = False
    for batch in batches:
        try:
            uploaded = ops.upload(batch)
            with np.errstate(over="ignore", invalid="ignore"):
                download = ops.download(stage.forward(uploaded))
            under_way.append((batch, uploaded, download))
        except MemoryError:  # not kept: its traceback would keep the arrays of the failed pass
            out_of_memory = True
            break
        if len(under_way) > IN_FLIGHT:
            yield _finish(*under_way.popleft())
    while under_way:
        yield _finish(*under_way.popleft())
    if out_of_memory:
        raise MemoryError


def _finish(
    batch: MicroBatch, uploaded: MicroBatch, download: Callable[[], np.ndarray]
) -> tuple[MicroBatch, np.ndarray]:
    """Wait for a micro-batch; until then its arrays on the device (`uploaded`) are in use."""
    return batch, download()
