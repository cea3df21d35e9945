"""Prompts in, tokens out: sequences grow side by side, and one that ends makes room for the next.

A prompt waits until there are a row and blocks of the cache for all that it may become, so nothing
that was begun is ever put off. Passes are queued one ahead: the next step is under way before the
tokens of the last one are looked at, and what it makes of a sequence that had ended is dropped. A
sequence's row and blocks are given away only when no queued pass is left that writes there.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupyllama.errors import DeviceError, NotFiniteError
from cupyllama.generation.batch import Segment, cached_batch
from cupyllama.generation.blocks import BLOCK_TOKENS, BlockPool, slots_of
from cupyllama.generation.settings import NO_TOKEN, SamplingSettings

# Prompts are fed until a pass has so many tokens: more would only make those that run wait.
PREFILL_TOKENS = 4096

Decoder = Any  # of cupyllama.ops.decode_reference or decode_cuda


@dataclass(frozen=True)
class Prompt:
    """What a sequence begins with, and how it goes on."""

    token_ids: Sequence[int]
    max_new_tokens: int
    settings: SamplingSettings = SamplingSettings()
    eos_token_ids: frozenset[int] = frozenset()  # any of them ends it
    name: str = "the prompt"  # for messages

    @property
    def keys(self) -> int:
        """That the cache comes to hold at most: the last token is not fed."""
        return len(self.token_ids) + self.max_new_tokens - 1


class Event(NamedTuple):
    """A token that was sampled."""

    number: int  # of the prompt, from 0
    token: int  # an EOS too
    finished: bool  # whether it is the sequence's last


@dataclass
class _Sequence:
    """A prompt that has a row."""

    number: int
    prompt: Prompt
    row: int
    blocks: list[int]
    computed_from: int  # the first token of the prompt that is not in the cache
    queued: int = 0  # tokens that passes have been queued for
    seen: int = 0  # of these, looked at
    ended: bool = False

    @property
    def grows(self) -> bool:
        """Whether the next step is to sample a token for it."""
        return not self.ended and self.queued < self.prompt.max_new_tokens


@dataclass
class _Pass:
    """Tokens that are on their way."""

    tokens: Callable[[], np.ndarray]
    sequences: list[_Sequence]
    places: list[int]  # of their tokens among those that come


class Engine:
    """A model that generates. Several ranks each have one, and give it the same prompts."""

    def __init__(self, decoder: Decoder, pool: BlockPool, rows: int, max_keys: int):
        """`rows` and `max_keys`: what the decoder was made with."""
        self.decoder, self.pool = decoder, pool
        self._rows, self._max_keys = rows, max_keys
        # The last stage's tokens go to all ranks before a step returns: there is nothing to queue.
        self._ahead = 1 if decoder.links is None else 0
        self._stopped = True
        self._cancelled: set[int] = set()
        self.prompt_tokens_computed = 0  # those that lay in the cache are not counted

    def check(self, prompt: Prompt) -> None:
        """Raises DeviceError where the cache is too small for a prompt, even alone."""
        assert prompt.token_ids and prompt.max_new_tokens > 0
        if prompt.keys > min(self._max_keys, self.pool.capacity * BLOCK_TOKENS):
            room = min(self._max_keys, self.pool.capacity * BLOCK_TOKENS) + 1
            raise DeviceError(
                f"a prompt of {len(prompt.token_ids)} tokens with {prompt.max_new_tokens} new ones "
                f"does not fit the cache, which has room for {room}",
                "Give fewer --max-new-tokens, or free some of the device's memory.",
            )

    def cancel(self, number: int | None = None) -> None:
        """End a sequence, or all; nothing more comes of it. Between events, or in a signal handler.

        Several ranks must all do so after the same event.
        """
        if number is None:
            self._stopped = True
        else:
            self._cancelled.add(number)

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Event]:
        """The tokens of all prompts, each as soon as it is known; one call at a time.

        Raises:
            DeviceError: a prompt does not fit the cache, before anything is computed; or the device
                ran out of memory.
            NotFiniteError: logits are NaN or infinite; all ranks find that at the same token. What
                is in the cache is of no more use.
        """
        for prompt in prompts:
            self.check(prompt)
        assert self._stopped
        self._stopped, self._cancelled = False, set()
        waiting, under_way = deque(enumerate(prompts)), deque()
        running: dict[int, _Sequence] = {}  # by their rows
        rows = list(range(self._rows))
        try:
            while (waiting or running) and not self._stopped:
                with self.decoder.stage.ops.memory_errors():
                    queued = self._admit(waiting, running, rows) + self._step(running)
                under_way.extend(queued)
                while len(under_way) > (self._ahead if queued else 0):
                    yield from self._look(under_way.popleft())
                self._free(running, rows)
        except BaseException as error:
            for sequence in running.values():
                self.pool.forget(sequence.blocks)
            if isinstance(error, MemoryError):
                raise DeviceError(
                    f"out of memory with {len(running)} sequences at a time",
                    "Give a smaller --batch-size.",
                ) from error
            raise
        finally:
            self._stopped = True
            for sequence in running.values():
                self.pool.release(sequence.blocks)
            for one in under_way:
                one.tokens()  # copies that are on their way need the memory that they go to

    def _admit(self, waiting: deque, running: dict[int, _Sequence], rows: list[int]) -> list[_Pass]:
        """Give rows and blocks to those that wait, in order, and queue a pass over them."""
        new: list[_Sequence] = []
        tokens = 0
        while waiting and rows and tokens < PREFILL_TOKENS:
            number, prompt = waiting[0]
            if number not in self._cancelled:
                taken = self.pool.take(prompt.token_ids, prompt.keys)
                if taken is None:
                    break
                new.append(_Sequence(number, prompt, heapq.heappop(rows), *taken, queued=1))
                running[new[-1].row] = new[-1]
                tokens += len(prompt.token_ids) - new[-1].computed_from
            waiting.popleft()
        if not new:
            return []
        segments = []
        for sequence in new:
            prompt, first = sequence.prompt, sequence.computed_from
            slots = slots_of(sequence.blocks, prompt.keys)
            self.decoder.admit(sequence.row, slots, prompt.settings, prompt.token_ids)
            fed = slots[: len(prompt.token_ids)]
            segments.append(Segment(prompt.token_ids[first:], first, fed))
        self.prompt_tokens_computed += tokens
        found = self.decoder.prefill(cached_batch(segments), [sequence.row for sequence in new])
        return [_Pass(found, new, list(range(len(new))))]

    def _step(self, running: dict[int, _Sequence]) -> list[_Pass]:
        """Queue a step of all that grow."""
        growing = [sequence for sequence in running.values() if sequence.grows]
        if not growing:
            return []
        places = [sequence.row for sequence in growing]
        positions = np.full(max(places) + 1, -1, np.int32)
        for sequence in growing:
            positions[sequence.row] = len(sequence.prompt.token_ids) + sequence.queued - 1
            sequence.queued += 1
        return [_Pass(self.decoder.step(positions), growing, places)]

    def _look(self, one: _Pass) -> Iterator[Event]:
        """Wait for a pass, and tell what came of it."""
        tokens = one.tokens()[one.places].tolist()
        for sequence in one.sequences:
            sequence.seen += 1
        for sequence, token in zip(one.sequences, tokens, strict=True):
            sequence.ended |= sequence.number in self._cancelled or self._stopped
            if sequence.ended:
                continue
            prompt = sequence.prompt
            if token == NO_TOKEN:
                raise not_finite(prompt.name, sequence.seen)
            sequence.ended = token in prompt.eos_token_ids or sequence.seen == prompt.max_new_tokens
            yield Event(sequence.number, token, sequence.ended)

    def _free(self, running: dict[int, _Sequence], rows: list[int]) -> None:
        """Take back what no queued pass writes to."""
        for sequence in list(running.values()):
            sequence.ended |= sequence.number in self._cancelled
            if sequence.ended and sequence.seen == sequence.queued:
                self.pool.release(sequence.blocks)
                heapq.heappush(rows, sequence.row)
                del running[sequence.row]


def not_finite(name: str, number: int) -> NotFiniteError:
    """What is said of a prompt's new token, counted from 1, that could not be chosen."""
    return NotFiniteError(f"{name}: the logits of new token {number} are NaN or infinite")
