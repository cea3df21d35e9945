"""The run itself: micro-batches through a stage, log-probabilities back, a result a choice."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyllama.errors import DeviceError
from cupyllama.families import Stage
from cupyllama.packing import MicroBatch, TokenRow, pack
from cupyllama.parallel.channels import Inbox, Outbox
from cupyllama.trace import Span

# Micro-batches given to the device before the oldest is waited for: launches stay ahead of it.
IN_FLIGHT = 2


@dataclass
class ChoiceScores:
    """What the model says of every choice, in the order of the rows."""

    loglikelihoods: np.ndarray  # (choices,) float64, sum over the choice's tokens
    is_greedy: np.ndarray  # (choices,) bool: every token was the most likely one
    done: np.ndarray  # (choices,) bool
    micro_batch_tokens: list[int]  # more than one entry: memory ran out and the size was halved
    tokens_computed: int = 0

    @classmethod
    def empty(cls, choices: int, micro_batch_tokens: int) -> "ChoiceScores":
        """Nothing scored yet."""
        flags = np.ones(choices, bool), np.zeros(choices, bool)
        return cls(np.zeros(choices), *flags, [micro_batch_tokens])

    def add(self, batch: MicroBatch, out: np.ndarray) -> np.ndarray:
        """Take over what `ops.log_probs` found for a micro-batch; returns its choices."""
        choices = np.unique(batch.target_choice)
        target = np.searchsorted(choices, batch.target_choice)
        # bincount adds in order: the same sum whatever else is in the micro-batch
        sums = np.bincount(target, out[0].astype(np.float64), len(choices))
        greedy = np.bincount(target, out[1] == 0, len(choices)) == 0
        self.put(choices, sums, greedy)
        self.tokens_computed += len(batch.token_ids)
        return choices

    def put(self, choices: np.ndarray, loglikelihoods: np.ndarray, is_greedy: np.ndarray) -> None:
        """Results of whole choices, from wherever they come."""
        self.loglikelihoods[choices] = loglikelihoods
        self.is_greedy[choices] = is_greedy
        self.done[choices] = True

    def missing(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with a choice that is not scored yet."""
        return [batch for batch in batches if not self.done[batch.target_choice].all()]


@dataclass
class Line:
    """One stage of a pipeline, the neighbours it has, and its turns on a device it shares."""

    stage: Stage
    inbox: Inbox | None = None
    outbox: Outbox | None = None
    turn: AbstractContextManager = nullcontext()
    link_seconds: float | None = None  # of a micro-batch from the stage before
    spans: list[Span] = field(default_factory=list)


def plan(rows: Sequence[TokenRow], micro_batch_tokens: int, ops: Any) -> list[MicroBatch]:
    """The micro-batches of a run on the device whose operations are `ops`."""
    return list(pack(rows, micro_batch_tokens, ops.TOKEN_MULTIPLE))


def evaluate(
    line: Line,
    rows: Sequence[TokenRow],
    batches: Sequence[MicroBatch],
    scores: ChoiceScores,
    on_choices: Callable[[np.ndarray], None] = lambda choices: None,
    on_halved: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Score the rows of `batches` in one process.

    A micro-batch that does not fit the device's memory is cut in half, and so are all after it.
    A value that is no number is left in the result for the caller to find.

    Args:
        batches: of `plan(rows, …)`, those that are missing from `scores`.
        on_choices: called with the choices of each micro-batch that is done.
        on_halved: called with the new size where memory ran out.

    Raises:
        DeviceError: not even the longest row fits.
    """
    ops = line.stage.ops
    while batches:
        done = 0
        try:
            for batch, out in zip(batches, forward_all(line, batches), strict=True):
                choices = scores.add(batch, out)
                done += 1
                on_choices(choices)
            return
        except MemoryError as error:
            ops.release_memory()
            left = np.unique(np.concatenate([b.target_choice for b in batches[done:]]))
            remaining = [rows[choice] for choice in left]
            longest = max(len(row.token_ids) - 1 for row in remaining)
            size = scores.micro_batch_tokens[-1]
            if size <= longest:
                raise DeviceError(
                    f"out of memory with micro-batches of {size} tokens",
                    "The longest row needs that many. A device with more memory is needed.",
                ) from error
            scores.micro_batch_tokens.append(max(size // 2, longest))
            on_halved(scores.micro_batch_tokens[-1])
            batches = plan(remaining, scores.micro_batch_tokens[-1], ops)


def first_broken(stage: Stage, rows: Sequence[TokenRow], suspects: np.ndarray) -> int | None:
    """The first suspect whose log-likelihood is not a number when its row is alone.

    In company, a NaN also reaches the rows that share a prefix with the row it belongs to: masked
    keys weigh 0, and 0 · NaN is NaN.
    """
    for choice in suspects:
        row = TokenRow(rows[choice].token_ids, rows[choice].first_target, 0)
        size = len(row.token_ids) - 1
        scores = ChoiceScores.empty(1, size)
        evaluate(Line(stage), [row], plan([row], size, stage.ops), scores)
        if not np.isfinite(scores.loglikelihoods[0]):
            return int(choice)
    return None


def forward_all(line: Line, batches: Sequence[MicroBatch]) -> Iterator[np.ndarray | None]:
    """Each micro-batch through the stage, in order, a few under way at a time.

    Yields:
        (2, targets) float32 on the host from the last stage; None where the hidden states went on.
    """
    ops = line.stage.ops
    clock = ops.Clock()
    under_way: deque = deque()
    out_of_memory = False
    for number, batch in enumerate(batches):
        try:
            with ops.memory_errors():
                under_way.append(_forward(line, clock, number, batch))
        except MemoryError:  # not kept: its traceback would keep the arrays of the failed pass
            out_of_memory = True
            break
        if len(under_way) > IN_FLIGHT:
            yield _finish(line, clock, *under_way.popleft())
    while under_way:
        yield _finish(line, clock, *under_way.popleft())
    if out_of_memory:
        raise MemoryError


def _forward(line: Line, clock: Any, number: int, batch: MicroBatch) -> tuple:
    """Queue one micro-batch: from the inbox, through the stage, to the outbox or to the host."""
    ops = line.stage.ops
    marks = [clock.mark()]
    uploaded = ops.upload(batch)
    hidden = line.inbox.receive(len(batch.token_ids)) if line.inbox else None
    with line.turn, np.errstate(over="ignore", invalid="ignore"):
        marks.append(clock.mark())
        out = line.stage.forward(uploaded, hidden)
        marks.append(clock.mark())
    departure = line.outbox.send(out) if line.outbox else None
    if line.inbox:
        line.inbox.release(departure)
    finish = departure.wait if departure else ops.download(out)
    # `uploaded` stays until the end: its arrays on the device are in use.
    return number, uploaded, marks, finish


def _finish(
    line: Line, clock: Any, number: int, uploaded: MicroBatch, marks: list, finish: Callable
) -> np.ndarray | None:
    """Wait until a micro-batch has left this stage, and note when it was worked on."""
    waiting = clock.now()
    out = finish()
    begin, ready, end = (clock.seconds(mark) for mark in marks)
    if line.inbox:
        line.spans.append(Span("receive", number, begin, ready))
    line.spans.append(Span("compute", number, ready, end))
    if line.outbox:
        line.spans.append(Span("send", number, max(end, waiting), clock.now()))
    return out
