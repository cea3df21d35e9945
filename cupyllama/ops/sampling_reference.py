"""The choice of the next token in NumPy: its definition.

Every row has its own settings and its own random numbers, and its token depends on nothing else.
Likelihoods are added as integers, in which the order of a sum changes nothing: another device draws
the very same tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cupyllama.generation.settings import NO_TOKEN, SamplingSettings
from cupyllama.kernels.definitions import sampling_constants

Array = Any

# Tokens 2^32 times less likely than the most likely one are never drawn.
OCTAVES = 32
# 2^-f for f from 0 to 1, within 2e-7 of it: 1 + f · (c1 + f · (c2 + ...)).
_EXP2 = (-0.693143725, 0.24018015, -0.0552973598, 0.00920579862, -0.000944903702)
_TINY = np.finfo(np.float32).tiny
_LOG2_E = np.float32(1.4426950408889634)


class SamplingState:
    """What is known of the sequence in each of `rows` rows."""

    def __init__(self, rows: int, vocab_size: int, module: Any = np):
        """
        Args:
            module: numpy or cupy, which makes the arrays.
        """
        self.temperature = module.zeros(rows, np.float32)
        self.top_k = module.zeros(rows, np.int32)
        self.top_p = module.ones(rows, np.float32)
        self.repetition_penalty = module.ones(rows, np.float32)
        self.seed = module.zeros(rows, np.uint64)
        self.drawn = module.zeros(rows, np.int32)  # tokens that it was given
        # A bit a token: whether the sequence has it.
        self.seen = module.zeros((rows, -(-vocab_size // 32)), np.uint32)

    def put(self, row: int, settings: SamplingSettings, seen_ids: Sequence[int]) -> None:
        """Begin a sequence.

        Args:
            seen_ids: tokens that the repetition penalty is for from the start; those that the row
                is given join them.
        """
        self.temperature[row] = settings.temperature
        self.top_k[row] = bounded_top_k(settings)
        self.top_p[row] = settings.top_p
        self.repetition_penalty[row] = settings.repetition_penalty
        self.seed[row] = settings.seed
        self.drawn[row] = 0
        self.seen[row] = 0
        ids = np.asarray(seen_ids, np.int64)
        np.bitwise_or.at(self.seen[row], ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


def bounded_top_k(settings: SamplingSettings) -> int:
    """As int32 has it: no vocabulary is larger."""
    return min(settings.top_k, 2**31 - 1)


def sample(logits: Array, rows: Array, state: SamplingState, tokens: Array) -> None:
    """Choose the next token of rows, HF's way.

    1. Repetition penalty (Keskar et al. 2019): logits of tokens that the row has seen are divided
       by it where they are positive, else multiplied.
    2. Temperature 0 takes the largest logit, of equal ones the lowest token; another divides them.
    3. top-k keeps the k largest, and all that are equal to the last of them.
    4. top-p (Holtzman et al. 2020) keeps, of those, the fewest of the largest whose probabilities
       come to p, and all that are equal to the last of them.
    5. Of what is kept a token is drawn as likely as softmax makes it: the first at which the sum of
       the likelihoods of all tokens up to it is above a random share of the whole.

    A likelihood is an integer, `weight_bits` of the vocabulary long and shifted: right to 1 in
    2^weight_bits, 65,536 or more up to 65,535 tokens.
    -infinity is never taken. Where after step 1 a logit is NaN or infinity, or all are -infinity,
    the row is given NO_TOKEN, and its state stays as it is.

    Args:
        logits: (n, vocab) float32. The caller gives them up.
        rows: (n,) int32, whose logits those are, each row once; -1: nobody's.
        state: its row counts the token and has seen it then.
        tokens: (rows of the state,) int32; the token is written to that of the row.
    """
    for scores, row in zip(logits, rows.tolist(), strict=True):
        if row < 0:
            continue
        _flush(scores)
        if state.repetition_penalty[row] != 1:
            _penalise(scores, state.seen[row], state.repetition_penalty[row])
        best = int(scores.argmax())  # of NaN, where there is one
        if not np.isfinite(scores[best]):
            tokens[row] = NO_TOKEN
            continue
        if state.temperature[row] == 0:
            token = best
        else:
            kept = likelihoods(
                scores, state.temperature[row], int(state.top_k[row]), state.top_p[row]
            )
            sums = np.cumsum(kept, dtype=np.uint64)
            share = random_64_bits(int(state.seed[row]), int(state.drawn[row]))
            token = int(sums.searchsorted(np.uint64(share * int(sums[-1]) >> 64), side="right"))
        tokens[row] = token
        state.seen[row, token // 32] |= np.uint32(1 << token % 32)
        state.drawn[row] += 1


def top_log_probs(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` most likely tokens of each row, the most likely first, of equal ones the lowest.

    A NaN among the logits makes the values of its row NaN.

    Args:
        logits: (rows, vocab) float32.
        count: at most the vocabulary.

    Returns:
        Their log softmax and the tokens: (rows, count) float32 and int32.
    """
    scores = np.where(np.isnan(logits), np.float32(-np.inf), logits)
    _flush(scores)
    tokens = np.argsort(-scores, axis=1, kind="stable")[:, :count].astype(np.int32)
    peak = scores.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):  # where there are no numbers
        log_sum = np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
        return np.take_along_axis(scores, tokens, axis=1) - peak - log_sum, tokens


def likelihoods(
    scores: np.ndarray, temperature: np.float32, top_k: int, top_p: np.float32
) -> np.ndarray:
    """How likely each token is drawn, in common units, 0 for those that are not kept.

    Args:
        scores: (vocab,) float32, one of them finite and the others that or -infinity.

    Returns:
        (vocab,) uint64.
    """
    peak = scores.max()
    with np.errstate(over="ignore"):  # what is so far below is not drawn
        octaves = (peak - scores) * (_LOG2_E / temperature)
    weights = _weights(octaves, len(scores))
    if 0 < top_k < len(scores):
        last = np.partition(np.where(weights > 0, scores, -np.inf), -top_k)[-top_k]
        weights[scores < last] = 0
    if top_p < 1:
        order = np.argsort(np.where(weights > 0, -scores, np.inf), kind="stable")
        sums = np.cumsum(weights[order], dtype=np.uint64)
        wanted = max(np.uint64(np.ceil(np.float64(top_p) * np.float64(sums[-1]))), np.uint64(1))
        weights[scores < scores[order[sums.searchsorted(wanted)]]] = 0
    return weights


def random_64_bits(seed: int, number: int) -> int:
    """The random number of a row's token, counted from 0."""
    low, high, _, _ = philox((number, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return high << 32 | low


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011)."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = second >> 32 ^ b ^ k, second & 0xFFFFFFFF
        c, d = first >> 32 ^ d ^ m, first & 0xFFFFFFFF
        k, m = k + 0x9E3779B9 & 0xFFFFFFFF, m + 0xBB67AE85 & 0xFFFFFFFF
    return a, b, c, d


def _penalise(scores: np.ndarray, seen: np.ndarray, penalty: np.float32) -> None:
    """Step 1 of `sample`, in place."""
    ids = np.flatnonzero(seen[:, None] >> np.arange(32, dtype=np.uint32) & 1)
    old = scores[ids]
    with np.errstate(over="ignore"):
        scores[ids] = np.where(old < 0, old * penalty, old / penalty)
    _flush(scores)


def _flush(scores: np.ndarray) -> None:
    """Make 0 of subnormal numbers, as the kernels are compiled to."""
    scores[np.abs(scores) < _TINY] = 0


def _weights(octaves: np.ndarray, vocab: int) -> np.ndarray:
    """2^-octaves as integers: (vocab,) float32 -> uint64; 0 from OCTAVES on."""
    near = octaves < OCTAVES
    x = np.where(near, octaves, 0)
    whole = np.floor(x)
    fraction, sum_ = x - whole, np.float32(_EXP2[-1])
    for constant in (*_EXP2[-2::-1], 1.0):
        # In float64 as a fused multiply-add: rounded once.
        sum_ = (np.float64(sum_) * fraction + np.float32(constant)).astype(np.float32)
    bits = sampling_constants(vocab)["WEIGHT_BITS"]
    mantissa = np.rint(sum_ * np.float32(1 << bits)).astype(np.uint64)
    return np.where(near, mantissa << (OCTAVES - 1 - whole).astype(np.uint64), np.uint64(0))
