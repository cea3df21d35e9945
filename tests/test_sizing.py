"""The size of a micro-batch: what was asked for, the default, or what fits."""

import numpy as np
import pytest
from tiny_models import write_tiny_model

from cupyllama.config import load_config
from cupyllama.sizing import DEFAULT_TOKENS, LEAST_TOKENS, activation_bytes, micro_batch_tokens


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_tiny_model("gqa", tmp_path_factory.mktemp("model")))


def test_activations_by_hand(config):
    # a token in the MLP: hidden and normed 128 each, q k v 64 · (8 + 2 + 2), attention 64 · 8,
    # gate and up 2 · 256, their product 256
    token = 2 * 128 + 768 + 512 + 3 * 256
    # a row of logits: 320 of float32, and the normed hidden state they are made of
    for dtype, size in [("float32", 4), ("float16", 2), ("bfloat16", 2)]:
        for tokens, chunk in [(1, 1), (8192, 1024), (256, 512)]:
            expected = tokens * token * size + chunk * (320 * 4 + 128 * size)
            assert activation_bytes(config, tokens, dtype, chunk) == expected


def test_what_is_asked_for_is_taken(config):
    assert micro_batch_tokens(100, 5000, config, "float16", 1024, 0) == 100


def test_the_default_holds_the_longest_row(config):
    assert DEFAULT_TOKENS == 8192 and LEAST_TOKENS == 256
    for free in (None, 1 << 40):
        assert micro_batch_tokens(None, 100, config, "float16", 1024, free) == 8192
        assert micro_batch_tokens(None, 9000, config, "float16", 1024, free) == 9000


@pytest.mark.parametrize("halvings", range(6))
def test_halved_until_nine_tenths_of_the_memory_are_enough(config, halvings):
    size = 8192 >> halvings
    needed = activation_bytes(config, size, "float32", 1024)
    enough = int(np.ceil(needed / 0.9))
    assert micro_batch_tokens(None, 100, config, "float32", 1024, enough + 1) == size
    smaller = size // 2 if size > LEAST_TOKENS else size
    assert micro_batch_tokens(None, 100, config, "float32", 1024, enough - 2) == smaller


def test_never_halved_below_the_longest_row(config):
    assert micro_batch_tokens(None, 100, config, "float16", 1024, 0) == 256
    assert micro_batch_tokens(None, 3000, config, "float16", 1024, 0) == 4096
    assert micro_batch_tokens(None, 9000, config, "float16", 1024, 0) == 9000
