"""The choice of the next token in NumPy, against probabilities in float64 and by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sampling_truth import (
    CASES,
    DRAWS,
    ROWS,
    SEEN,
    VOCAB,
    assert_drawn_as_likely,
    case_logits,
    probabilities,
)

from cupyllama.errors import UsageError
from cupyllama.generation.settings import NO_TOKEN, SamplingSettings
from cupyllama.ops import sampling_reference
from cupyllama.ops.sampling_reference import (
    SamplingState,
    likelihoods,
    philox,
    sample,
    top_log_probs,
)

NAN, INF = np.nan, np.inf


def float32(*numbers):
    return np.array(numbers, np.float32)


def kept(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The tokens that may be drawn."""
    weights = likelihoods(float32(*logits), np.float32(temperature), top_k, np.float32(top_p))
    return np.flatnonzero(weights).tolist()


def draw(logits, settings, seen=(), draws=1):
    """Tokens that one row is given, with the same logits each time."""
    logits = np.array(logits, np.float32)
    state, tokens, drawn = SamplingState(1, len(logits)), np.zeros(1, np.int32), []
    state.put(0, settings, seen)
    for _ in range(draws):
        sample(logits.copy()[None], np.zeros(1, np.int32), state, tokens)
        drawn.append(int(tokens[0]))
    return drawn


def test_philox_gives_the_published_numbers():
    """kat_vectors of Random123 1.14."""
    zeros, ones = 0, 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert philox((zeros,) * 4, (zeros,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi[:4], pi[4:]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_as_likely_as_they_are(case):
    """By rows of different seeds, from what the prompt has brought each time."""
    settings, logits = CASES[case], case_logits()
    state, rows = SamplingState(ROWS, VOCAB), np.arange(ROWS, dtype=np.int32)
    for row in rows:
        state.put(row, replace(settings, seed=int(row)), SEEN)
    seen, tokens = state.seen.copy(), np.zeros(ROWS, np.int32)
    counts = np.zeros(VOCAB, np.int64)
    for _ in range(DRAWS // ROWS):
        sample(np.tile(logits, (ROWS, 1)), rows, state, tokens)
        np.add.at(counts, tokens, 1)
        state.seen[:] = seen
    assert (state.drawn == DRAWS // ROWS).all()
    assert_drawn_as_likely(counts, probabilities(logits, settings, SEEN))


@pytest.mark.parametrize("vocab", [5, 331, 50272])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_likelihoods(vocab, temperature):
    """Right to 1 in 2^16 of 50,272 tokens; of fewer as far as float32 goes."""
    logits = np.random.default_rng(vocab).normal(0, 3, vocab).astype(np.float32)
    weights = likelihoods(logits, np.float32(temperature), 0, np.float32(1)).astype(float)
    octaves = (logits.max() - logits.astype(float)) / temperature / math.log(2)
    assert (weights[octaves > 32.001] == 0).all()
    near = octaves < 31.999
    error = np.abs(weights[near] / weights.max() * 2 ** octaves[near] - 1)
    assert error.max() < (1.2 / 2**16 if vocab > 2**15 else 6e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("top_k, top_p", [(1, 1), (20, 0.95), (0, 0.95), (0, 0.3), (1500, 0.999)])
def test_kept_tokens(temperature, top_k, top_p):
    settings = SamplingSettings(temperature, top_k, top_p)
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 2, 2000).astype(np.float32)
        expected = np.flatnonzero(probabilities(logits, settings))
        assert kept(logits, temperature, top_k, top_p) == expected.tolist()


def test_temperature_is_before_top_p():
    logits = np.log([0.5, 0.3, 0.2])  # at 0.5: 0.658, 0.237, 0.105
    assert kept(logits, 1, top_p=0.6) == [0, 1]
    assert kept(logits, 0.5, top_p=0.6) == [0]


def test_top_k_is_before_top_p():
    logits = np.log([0.1, 0.4, 0.2, 0.3])  # of two: 0.571, 0.429
    assert kept(logits, top_p=0.55) == [1, 3]
    assert kept(logits, top_k=2, top_p=0.55) == [1]
    assert kept(logits, top_k=2, top_p=0.58) == [1, 3]


def test_ties_are_kept():
    assert kept([1, 3, 1, 2, 1, 0], top_k=3) == [0, 1, 2, 3, 4]
    assert kept([1, 3, 1, 3, 1, 0], top_k=1) == [1, 3]
    assert kept([1, 1, 1, 1], top_p=0.3) == [0, 1, 2, 3]
    assert kept(np.log([0.3, 0.1, 0.3, 0.3]), top_p=0.25) == [0, 2, 3]


def test_ends_of_top_k_and_top_p():
    logits = [0.5, 2, 1]
    assert kept(logits, top_p=0) == kept(logits, top_p=1e-9) == [1]
    assert kept(logits, top_k=3) == kept(logits, top_k=1000) == [0, 1, 2]
    assert kept(logits, top_p=np.nextafter(np.float32(1), 0)) == [0, 1, 2]
    assert kept(logits, 1e-30) == [1] and kept(logits, 1e30) == [0, 1, 2]
    assert kept([7]) == kept([7], top_p=0.1) == [0]
    log2_e = np.float32(1 / math.log(2))
    assert kept([-1, 0, -1], log2_e, top_p=0.5) == [1]  # 1/4, 1/2, 1/4: that much is enough
    assert kept([-1, 0, -1], log2_e, top_p=0.5001) == [0, 1, 2]


def test_ends_of_what_is_drawn(monkeypatch):
    """The least and the largest random number lead to the first and the last token that is kept."""
    for number, token in ((0, 1), ((1 << 64) - 1, 3)):
        monkeypatch.setattr(sampling_reference, "random_64_bits", lambda *_, number=number: number)
        assert draw([-INF, 1, 2, 3, -INF], SamplingSettings(1.0)) == [token]


def test_repetition_penalty():
    """A positive logit is divided, a negative one multiplied, however often a token was seen."""
    greedy = SamplingSettings(repetition_penalty=4)
    assert draw([2, 1, 0], greedy, seen=[]) == [0]
    assert draw([2, 1, 0], greedy, seen=[0, 0, 0]) == [1]
    assert draw([3.9, 1, 0], greedy, seen=[0]) == [1]
    assert draw([4.1, 1, 0], greedy, seen=[0, 0, 0]) == [0]
    assert draw([-1, -3, -9], greedy, seen=[0]) == [1]
    assert draw([-1, -4.1, -9], greedy, seen=[0]) == [0]
    # 4, 2, 1 and 0.5 become 1 and so on: each token is seen once it was given.
    assert draw([4.2, 2.1, 1.06], greedy, draws=3) == [0, 1, 2]
    # Before top-k, which keeps one.
    drawn = draw([2, 1, 0], SamplingSettings(1.0, top_k=1, repetition_penalty=4), seen=[0])
    assert drawn == [1]


def test_the_largest_is_the_first_of_equals():
    assert draw([1, 3, 3, 2], SamplingSettings()) == [1]
    assert draw([0.0, -0.0, -1], SamplingSettings()) == [0]
    assert draw([-0.0, 0.0, -1], SamplingSettings()) == [0]


DECODINGS = [
    SamplingSettings(),
    SamplingSettings(repetition_penalty=1.3),
    SamplingSettings(1.0),
    SamplingSettings(1.0, top_k=2, top_p=0.99, repetition_penalty=0.7),
]


@pytest.mark.parametrize("settings", DECODINGS)
def test_minus_infinity_is_not_taken(settings):
    assert draw([-INF, -1, -INF], settings, draws=20) == [1] * 20


@pytest.mark.parametrize("settings", DECODINGS)
@pytest.mark.parametrize(
    "logits",
    [
        *([NAN, -1, 3], [5, 1, NAN], [1, -INF, -NAN], [1, INF, 2], [INF, INF, NAN]),
        *([-INF] * 3, [NAN] * 3, [INF, -INF, -INF]),
    ],
)
def test_logits_that_are_no_numbers_give_no_token(logits, settings):
    """Nor do they change what is known of the row, or the row beside it."""
    state, tokens = SamplingState(2, 3), np.full(2, 7, np.int32)
    for row in range(2):
        state.put(row, settings, [0])
    rows = np.arange(2, dtype=np.int32)
    sample(np.array([logits, [-9, 0, -9]], np.float32), rows, state, tokens)
    assert NO_TOKEN == -1 and tokens.tolist() == [-1, 1]
    assert state.drawn.tolist() == [0, 1] and state.seen.tolist() == [[1], [3]]


def test_a_seed_gives_the_same_again_and_another_does_not():
    logits = np.random.default_rng(1).normal(0, 1, 331)
    seeds = [0, 1, 1 << 32, (1 << 64) - 1]
    drawn = [draw(logits, SamplingSettings(1.0, seed=seed), draws=20) for seed in seeds]
    assert drawn == [draw(logits, SamplingSettings(1.0, seed=seed), draws=20) for seed in seeds]
    assert len({tuple(tokens) for tokens in drawn}) == len(seeds)
    assert all(len(set(tokens)) > 10 for tokens in drawn)


def test_a_row_depends_on_itself_alone():
    """Whatever stands beside it, wherever it stands, and whoever had the row before."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, (8, 6, 331)).astype(np.float32)
    settings = [SamplingSettings(0.3 * i, 5 * i, 0.8, 1.3, seed=i) for i in range(6)]
    together, tokens = SamplingState(6, 331), np.zeros(6, np.int32)
    for row in range(6):
        together.put(row, SamplingSettings(1.0), [1, 2, 3])
        together.put(row, settings[row], [row, 300])
    for step, numbers in enumerate(logits):
        order = rng.permutation(6).astype(np.int32)
        gaps = np.insert(order, 3, -1)
        sample(np.insert(numbers[order], 3, NAN, axis=0), gaps, together, tokens)
        for row in range(6):
            alone, token = SamplingState(1, 331), np.zeros(1, np.int32)
            alone.put(0, settings[row], [row, 300])
            for i in range(step + 1):
                sample(logits[i, row : row + 1].copy(), np.zeros(1, np.int32), alone, token)
            assert token[0] == tokens[row], (step, row)
            np.testing.assert_array_equal(alone.seen[0], together.seen[row])
            assert alone.drawn[0] == together.drawn[row] == step + 1


def test_a_row_that_is_nobodys_is_left_alone():
    state, tokens = SamplingState(2, 5), np.full(2, 9, np.int32)
    sample(np.ones((2, 5), np.float32), np.array([-1, 1], np.int32), state, tokens)
    assert tokens.tolist() == [9, 0]
    assert state.drawn.tolist() == [0, 1] and state.seen.tolist() == [[0], [1]]


@pytest.mark.parametrize("vocab, count", [(1, 1), (331, 331), (50272, 8)])
def test_top_log_probs(vocab, count):
    logits = np.random.default_rng(3).normal(0, 3, (5, vocab)).astype(np.float32)
    values, tokens = top_log_probs(logits.copy(), count)
    assert values.dtype == np.float32 and tokens.dtype == np.int32
    wide = logits.astype(float)
    for row, numbers in enumerate(wide):
        expected = sorted(range(vocab), key=lambda token: -numbers[token])[:count]
        assert tokens[row].tolist() == expected
        log_sum = math.log(np.exp(numbers).sum())
        np.testing.assert_allclose(values[row], numbers[expected] - log_sum, atol=2e-5)


def test_top_log_probs_of_equals_and_of_no_numbers():
    logits = np.array([[2, 1, 2, 1, 2], [-INF, 0, -INF, 0, -INF], [0, NAN, 1, 2, -INF]], np.float32)
    values, tokens = top_log_probs(logits, 4)
    assert tokens.tolist() == [[0, 2, 4, 1], [1, 3, 0, 2], [3, 2, 0, 1]]
    np.testing.assert_allclose(values[1], [-math.log(2)] * 2 + [-INF] * 2, rtol=1e-6)
    assert np.isnan(values[2]).all()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": NAN}, "temperature nan"),
        ({"temperature": 1e-40}, "temperature 1e-40"),
        ({"temperature": INF}, "temperature inf"),
        ({"top_k": -1}, "top-k -1"),
        ({"top_p": 1.01}, "top-p 1.01"),
        ({"top_p": -0.5}, "top-p -0.5"),
        ({"top_p": NAN}, "top-p nan"),
        ({"repetition_penalty": 0}, "repetition penalty 0"),
        ({"repetition_penalty": -2}, "repetition penalty -2"),
        ({"repetition_penalty": INF}, "repetition penalty inf"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 1 << 64}, f"seed {1 << 64}"),
    ],
)
def test_settings_that_make_no_sense(wrong, words):
    with pytest.raises(UsageError) as error:
        SamplingSettings(**wrong)
    assert words in str(error.value) and error.value.hint.startswith("Give ")


def test_settings():
    assert SamplingSettings() == SamplingSettings(0.0, 0, 1.0, 1.0, 0)
    assert SamplingSettings().greedy and not SamplingSettings(0.5).greedy
    state = SamplingState(2, 70)
    state.put(1, SamplingSettings(0.5, 1 << 40, 0.9, 1.1, (1 << 64) - 1), [69, 0, 31, 69])
    assert state.top_k[1] == 2**31 - 1 and state.seed[1] == (1 << 64) - 1
    assert state.seen.tolist() == [[0, 0, 0], [0x80000001, 0, 0x20]]
