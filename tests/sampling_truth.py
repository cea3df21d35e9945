"""How likely tokens are, in float64 and the way of transformers; and whether draws agree."""

import numpy as np

from cupyllama.generation.settings import SamplingSettings

DRAWS = 100_000
VOCAB = 41
SEEN = (0, 3, 4, 17, 40)
ROWS = 100
CASES = {
    "temperature": SamplingSettings(temperature=0.7),
    "top-k": SamplingSettings(temperature=1.3, top_k=7),
    "top-p": SamplingSettings(temperature=1.0, top_p=0.8),
    "penalty": SamplingSettings(temperature=1.0, repetition_penalty=1.5),
    "top-k and top-p": SamplingSettings(temperature=1.6, top_k=20, top_p=0.9),
    "all": SamplingSettings(temperature=1.2, top_k=15, top_p=0.85, repetition_penalty=0.8),
}


def case_logits():
    return np.random.default_rng(5).normal(0, 2, VOCAB).astype(np.float32)


def probabilities(logits, settings, seen=()):
    """(vocab,) float64."""
    scores = np.array(logits, np.float64)
    for token in set(seen):
        factor = settings.repetition_penalty
        scores[token] *= factor if scores[token] < 0 else 1 / factor
    scores /= settings.temperature
    if settings.top_k:
        scores[scores < np.sort(scores)[-min(settings.top_k, len(scores))]] = -np.inf
    likely = np.exp(scores - scores.max())
    likely /= likely.sum()
    if settings.top_p < 1:
        order = np.argsort(scores)  # the least likely first
        removed = np.cumsum(likely[order]) <= 1 - settings.top_p
        removed[-1] = False
        likely[order[removed]] = 0
    return likely / likely.sum()


def assert_drawn_as_likely(counts, likely):
    """Chi-square, as far out as a fair sampler gets once in 30,000 times."""
    assert counts[likely == 0].sum() == 0, f"{np.flatnonzero((likely == 0) & (counts > 0))}"
    expected = likely * counts.sum()
    rare = (expected > 0) & (expected < 10)
    pairs = [*zip(counts[expected >= 10], expected[expected >= 10], strict=True)]
    if rare.any():
        pairs.append((counts[rare].sum(), expected[rare].sum()))
    chi_square = sum((count - mean) ** 2 / mean for count, mean in pairs)
    freedom = len(pairs) - 1
    # Wilson and Hilferty 1931: its cube root is close to normal.
    spread = 2 / (9 * freedom)
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5
    assert abs(deviation) < 4, f"{deviation=} {chi_square=} {freedom=}"
