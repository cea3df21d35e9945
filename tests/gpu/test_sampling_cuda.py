"""The choice of the next token on a GPU: the very tokens of the reference, in one launch."""

from dataclasses import replace

import numpy as np
import pytest
from sampling_truth import (
    CASES,
    DRAWS,
    SEEN,
    VOCAB,
    assert_drawn_as_likely,
    case_logits,
    probabilities,
)

from cupyllama.generation.settings import NO_TOKEN, SamplingSettings
from cupyllama.ops import sampling_reference as reference

cupy = pytest.importorskip("cupy")
sampling = pytest.importorskip("cupyllama.ops.sampling")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

VOCABS = [1, 2, 33, 331, 4098, 32000, 50265, 50272, 262144]


def awkward_logits(rng, vocab):
    """A row: flat, steep, rounded so that many are equal, or with what is no number."""
    row = rng.normal(0, rng.choice([0.01, 0.3, 1, 3, 10]), vocab).astype(np.float32)
    kind = rng.integers(9)
    if kind == 0:
        row[:] = 1.5
    elif kind == 1:
        row = np.round(row)
    elif kind == 2:
        row[rng.random(vocab) < 0.5] = -np.inf
    elif kind == 3:
        row[rng.random(vocab) < 0.3] = np.nan
    elif kind == 4:
        row[:] = rng.choice([np.nan, -np.inf])
    elif kind == 5:
        row[rng.integers(vocab)] = rng.choice([np.inf, 60, 1e38])
    elif kind == 6:
        row[:] = row[0]
        row[rng.integers(vocab)] += 3
    elif kind == 7:
        row = row.astype(np.float16).astype(np.float32)
    else:
        row[rng.random(vocab) < 0.5] *= np.float32(1e-38)  # subnormal, and signed zeros
    return row


def awkward_settings(rng, vocab):
    return SamplingSettings(
        temperature=float(rng.choice([0, 1e-20, 0.1, 0.7, 1, 1, 1, 5, 100, 1e30])),
        top_k=int(rng.choice([0, 0, 1, 2, 20, 300, 1000, 1025, 3000, vocab // 2, vocab])),
        top_p=float(rng.choice([1, 1, 0, 0.1, 0.5, 0.95, 0.999999])),
        repetition_penalty=float(rng.choice([1, 1.3, 0.7])),
        seed=int(rng.integers(1 << 63)),
    )


class Both:
    """The same rows on the host and on the device."""

    def __init__(self, settings, seen, vocab):
        capacity = len(settings)
        self.host = reference.SamplingState(capacity, vocab)
        self.device = sampling.SamplingState(capacity, vocab)
        self.tokens = np.full(capacity, -7, np.int32)
        self.device_tokens = cupy.asarray(self.tokens)
        for row, (row_settings, row_seen) in enumerate(zip(settings, seen, strict=True)):
            self.host.put(row, row_settings, row_seen)
            self.device.put(row, row_settings, row_seen)

    def sample(self, logits, rows):
        logits_device, rows_device = cupy.asarray(logits), cupy.asarray(rows)
        sampling.sample(logits_device, rows_device, self.device, self.device_tokens)
        reference.sample(logits.copy(), rows, self.host, self.tokens)

    def assert_same(self):
        different = np.flatnonzero(self.device_tokens.get() != self.tokens).tolist()
        assert not different, [
            (row, self.tokens[row], int(self.device_tokens[row])) for row in different
        ]
        for name in vars(self.host):
            host, device = getattr(self.host, name), getattr(self.device, name)
            np.testing.assert_array_equal(device.get(), host, err_msg=name)


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_are_those_of_the_reference(rng, vocab):
    count = 200 if vocab < 10_000 else 60
    settings = [awkward_settings(rng, vocab) for _ in range(count)]
    seen = [rng.integers(0, vocab, rng.integers(0, 300)).tolist() for _ in range(count)]
    both = Both(settings, seen, vocab)
    both.assert_same()
    for _ in range(2):
        rows = rng.permutation(count).astype(np.int32)
        rows[rng.random(count) < 0.1] = -1
        both.sample(np.stack([awkward_logits(rng, vocab) for _ in rows]), rows)
        both.assert_same()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, None])
def test_logits_that_are_no_numbers_give_no_token(rng, vocab, value):
    """Wherever the one is that is none; None: all are -infinity. Rows between them are sampled."""
    kinds = [
        SamplingSettings(),
        SamplingSettings(1.0),
        SamplingSettings(0.8, top_k=20, top_p=0.95, repetition_penalty=1.2),
    ]
    places = np.unique(
        [0, vocab - 1, *rng.integers(0, vocab, 40), *range(0, vocab, 1 + vocab // 9)]
    )
    count = 2 * len(places)
    settings = [replace(kinds[row % 3], seed=row) for row in range(count)]
    both = Both(settings, [rng.integers(0, vocab, 5).tolist() for _ in range(count)], vocab)
    logits = rng.normal(0, 2, (count, vocab)).astype(np.float32)
    for row, place in zip(range(0, count, 2), places, strict=True):
        logits[row, slice(None) if value is None else place] = -np.inf if value is None else value
    both.sample(logits, np.arange(count, dtype=np.int32))
    both.assert_same()
    broken = both.device_tokens.get() == NO_TOKEN
    np.testing.assert_array_equal(broken, np.arange(count) % 2 == 0)


@pytest.mark.parametrize("count", [0, 1, 3, 256, 1024])
def test_any_number_of_rows(rng, count):
    """Drawn from few tokens, from many and the most likely, side by side."""
    settings = [
        SamplingSettings(),
        SamplingSettings(1.0, top_k=20, top_p=0.95),
        SamplingSettings(0.8, top_p=0.95),
        SamplingSettings(1.2, repetition_penalty=1.2),
    ]
    chosen = [replace(settings[row % 4], seed=row) for row in range(1024)]
    both = Both(chosen, [[row] for row in range(1024)], 3001)
    rows = rng.permutation(1024)[:count].astype(np.int32)
    both.sample(rng.normal(0, 2, (count, 3001)).astype(np.float32), rows)
    both.assert_same()


@pytest.mark.parametrize("vocab", [32000, 50265, 262144])
@pytest.mark.parametrize("top_k, top_p", [(20, 0.95), (0, 0.95), (3000, 1), (5000, 0.9), (0, 1)])
def test_flat_rows(rng, vocab, top_k, top_p):
    """As a model of random weights has them: tens of thousands of tokens are kept."""
    settings = [SamplingSettings(1.0, top_k, top_p, seed=row) for row in range(20)]
    both = Both(settings, [[]] * 20, vocab)
    for scale in (0.02, 1):
        logits = rng.normal(0, scale, (20, vocab)).astype(np.float32)
        both.sample(logits, np.arange(20, dtype=np.int32))
        both.assert_same()


@pytest.mark.parametrize("vocab", [4098, 50272])
@pytest.mark.parametrize("top_p", [0.96, 0.99, 0.9999])
def test_top_p_ends_in_a_bin_that_top_k_cuts(rng, vocab, top_p):
    """100 tokens of the bin are kept; all 3,000 of it are more than the list has room for."""
    settings = [SamplingSettings(1.0, 1100, top_p, seed=row) for row in range(20)]
    both = Both(settings, [[]] * 20, vocab)
    logits = np.full((20, vocab), -5, np.float32)
    logits[:, :1000] = 1
    # Less than the 0.0108 that a bin is wide.
    logits[:, 1000:4000] = 0.5 + rng.uniform(0, 0.001, (20, 3000))
    logits = rng.permuted(logits, axis=1)
    both.sample(logits, np.arange(20, dtype=np.int32))
    both.assert_same()


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_as_likely_as_they_are(case):
    settings, logits, rows = CASES[case], cupy.asarray(case_logits()), 1000
    state, tokens = sampling.SamplingState(rows, VOCAB), cupy.zeros(rows, np.int32)
    for row in range(rows):
        state.put(row, replace(settings, seed=row), SEEN)
    seen, counts = state.seen.copy(), np.zeros(VOCAB, np.int64)
    numbers = cupy.arange(rows, dtype=np.int32)
    for _ in range(DRAWS // rows):
        sampling.sample(cupy.tile(logits, (rows, 1)), numbers, state, tokens)
        counts += np.bincount(tokens.get(), minlength=VOCAB)
        state.seen[:] = seen
    assert_drawn_as_likely(counts, probabilities(case_logits(), settings, SEEN))


def test_a_row_does_not_depend_on_its_company(rng):
    """Nor on where it stands; and the same seed gives the same again."""
    logits = rng.normal(0, 1, (64, 50272)).astype(np.float32)
    settings = [SamplingSettings(0.9, 40 * (row % 2), 0.95, 1.1, row) for row in range(64)]

    def tokens_of(order):
        state, tokens = sampling.SamplingState(64, 50272), cupy.zeros(64, np.int32)
        for row in order:
            state.put(int(row), settings[row], [int(row)])
        for _ in range(3):
            sampling.sample(cupy.asarray(logits[order]), cupy.asarray(order), state, tokens)
        return tokens.get()[order]

    everybody = np.arange(64, dtype=np.int32)
    together = tokens_of(everybody)
    np.testing.assert_array_equal(tokens_of(everybody), together)
    shuffled = rng.permutation(everybody)
    np.testing.assert_array_equal(tokens_of(shuffled), together[shuffled])
    for row in (0, 1, 63):
        assert tokens_of(everybody[row : row + 1])[0] == together[row]


def test_a_graph_draws_what_launches_draw(rng):
    settings = [SamplingSettings(1.0, 20 * (row % 2), 0.9, 1.2, row) for row in range(8)]
    both = Both(settings, [[]] * 8, 4098)
    rows, logits = np.arange(8, dtype=np.int32), np.empty((8, 4098), np.float32)
    logits_device, rows_device = cupy.asarray(logits), cupy.asarray(rows)
    nobody = cupy.full(8, -1, np.int32)
    sampling.sample(logits_device, nobody, both.device, both.device_tokens)  # compiled
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        sampling.sample(logits_device, rows_device, both.device, both.device_tokens)
        graph = stream.end_capture()
        for _ in range(5):
            logits = rng.normal(0, 2, (8, 4098)).astype(np.float32)
            logits_device.set(logits)
            graph.launch(stream)
            reference.sample(logits, rows, both.host, both.tokens)
            both.assert_same()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("count", [1, 2, 8, 64, 512])
def test_top_log_probs(rng, vocab, count):
    count = min(count, vocab)
    logits = np.stack([awkward_logits(rng, vocab) for _ in range(40)])
    values, tokens = sampling.top_log_probs(cupy.asarray(logits), count)
    expected_values, expected_tokens = reference.top_log_probs(logits, count)
    np.testing.assert_array_equal(tokens.get(), expected_tokens)
    # 1e38 less a logarithm is 1e38; else what float32 sums of all tokens are off by.
    np.testing.assert_allclose(values.get(), expected_values, rtol=1e-5, atol=2e-5)
    assert sampling.top_log_probs(cupy.asarray(logits[:0]), count)[0].shape == (0, count)
