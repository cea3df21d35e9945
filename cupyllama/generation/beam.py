"""Beam search as Hugging Face transformers does it, with length_penalty 1 and early_stopping False.

Of the likeliest continuations of all beams, those that end go to the hypotheses if they are among
the first `num_beams`, with the mean log-probability of their new tokens as score; the likeliest
others are the next beams. It is over when no beam's mean is above the worst hypothesis's.

Beams share what they have in common key by key: each has a list of the slots of its keys, and the
tokens of a step go to slots that no other step used. Nothing in the cache is moved.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyllama.errors import DeviceError
from cupyllama.generation.batch import Segment, cached_batch
from cupyllama.generation.blocks import BLOCK_TOKENS, BlockPool, blocks_for, slots_of
from cupyllama.generation.engine import not_finite

Decoder = Any  # of cupyllama.ops.decode_reference or decode_cuda


@dataclass(frozen=True)
class Hypothesis:
    """New tokens, with the EOS that ended them, if one did."""

    token_ids: list[int]
    score: float  # the mean of their log-probabilities


def beam_search(
    decoder: Decoder,
    pool: BlockPool,
    prompt: Sequence[int],
    num_beams: int,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    name: str = "the prompt",
) -> list[Hypothesis]:
    """The best continuations of a prompt, up to `num_beams` of them, the best one first.

    Args:
        name: of the prompt, for messages.

    Raises:
        DeviceError: the beams do not fit the cache, or the device ran out of memory.
        NotFiniteError: logits are NaN or infinite; all ranks find that at the same token.
    """
    assert prompt and num_beams > 0 and max_new_tokens > 0
    keys = len(prompt) + num_beams * (max_new_tokens - 1)
    taken = pool.take(prompt, keys)
    if taken is None:
        raise DeviceError(
            f"{num_beams} beams of {max_new_tokens} new tokens after {len(prompt)} take "
            f"{blocks_for(keys) * BLOCK_TOKENS} keys of the cache, which has "
            f"{pool.free * BLOCK_TOKENS} free",
            "Give fewer --max-new-tokens or a smaller --beam-width.",
        )
    blocks, first = taken
    try:
        slots = slots_of(blocks, keys)
        passes = _Passes(decoder, slots[: len(prompt)], slots[len(prompt) :], prompt, first, name)
        with decoder.stage.ops.memory_errors():
            return _search(passes, num_beams, max_new_tokens, eos_token_ids)
    except BaseException as error:
        pool.forget(blocks)
        if isinstance(error, MemoryError):
            raise DeviceError(
                f"out of memory with {num_beams} beams", "Give a smaller --beam-width."
            ) from error
        raise
    finally:
        pool.release(blocks)


class _Passes:
    """What the model says of the beams, and where their keys are."""

    def __init__(
        self,
        decoder: Decoder,
        keys: np.ndarray,
        fresh: np.ndarray,
        prompt: Sequence[int],
        first: int,
        name: str,
    ):
        self._decoder, self._name, self._prompt_tokens = decoder, name, len(prompt)
        self._fresh = fresh  # slots that no key has
        self._keys = keys[None]  # (beams, keys)
        self._batch = cached_batch([Segment(prompt[first:], first, keys)])

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """The next beams: each a former one, and a token more."""
        own, self._fresh = np.split(self._fresh, [len(tokens)])
        self._keys = np.concatenate([self._keys[parents], own[:, None]], axis=1)
        position = self._keys.shape[1] - 1
        pairs = zip(tokens, self._keys, strict=True)
        self._batch = cached_batch([Segment([token], position, keys) for token, keys in pairs])

    def likeliest(self, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each beam the likeliest next tokens: log-probabilities and ids, (beams, count).

        Args:
            wanted: how many, if the vocabulary has so many.

        Raises:
            NotFiniteError: the logits of a beam are; all ranks find that.
        """
        decoder = self._decoder
        count = min(wanted, decoder.stage.config.vocab_size)
        logits = decoder.next_logits(self._batch)
        values = np.empty((len(self._keys), count), np.float32)
        tokens = np.empty(values.shape, np.int32)
        if logits is not None:
            found = decoder.stage.ops.top_log_probs(logits, count)
            values[...], tokens[...] = (decoder.stage.ops.download(array)() for array in found)
        if decoder.links is not None:
            decoder.links.broadcast(values)
            decoder.links.broadcast(tokens)
        if np.isnan(values).any():  # so are all of a row with NaN or infinity, or with no other
            raise not_finite(self._name, self._keys.shape[1] - self._prompt_tokens + 1)
        return values, tokens


def _search(
    passes: _Passes, num_beams: int, max_new_tokens: int, eos_token_ids: Collection[int]
) -> list[Hypothesis]:
    # More of one beam cannot be used: as many go on at most, and those that end one are no more.
    wanted = num_beams + len(eos_token_ids)
    beams: list[list[int]] = [[]]
    scores = np.zeros(1, np.float32)
    hypotheses: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        values, tokens = passes.likeliest(wanted)
        totals = (values + scores[:, None]).ravel()
        going: list[tuple[int, int, np.float32]] = []
        for rank, place in enumerate(np.argsort(-totals, kind="stable").tolist()):
            parent, token = place // tokens.shape[1], int(tokens.flat[place])
            if token not in eos_token_ids and length < max_new_tokens:
                going.append((parent, token, totals[place]))
            elif rank < num_beams:
                mean = float(totals[place] / np.float32(length))
                hypotheses.append(Hypothesis(beams[parent] + [token], mean))
        hypotheses = sorted(hypotheses, key=lambda one: -one.score)[:num_beams]
        going = going[:num_beams]
        if not going:
            break
        best = going[0][2] / np.float32(length)
        if len(hypotheses) == num_beams and best <= hypotheses[-1].score:
            break
        parents, chosen, scores = (list(column) for column in zip(*going, strict=True))
        beams = [beams[parent] + [token] for parent, token in zip(parents, chosen, strict=True)]
        scores = np.array(scores, np.float32)
        passes.extend(parents, chosen)
    return hypotheses
