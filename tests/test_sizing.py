"""The size of a micro-batch: what was asked for, the default, or what fits."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

from cupyllama.bench.shapes import model_config
from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.config import load_config
from cupyllama.ops import reference
from cupyllama.sizing import (
    DEFAULT_TOKENS,
    LEAST_TOKENS,
    activation_bytes,
    default_tokens,
    micro_batch_tokens,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return load_config(write_tiny_model("gqa", tmp_path_factory.mktemp("model")))


def test_activations_by_hand(config):
    # hidden and normed 128 each, q k v 64 · (8 + 2 + 2), mixed 64 · 8; the MLP writes 256, or 512
    # for gate and up, which fit where q k v were
    token = 2 * 128 + 768 + 512
    for dtype, size in [("float32", 4), ("float16", 2), ("bfloat16", 2)]:
        for tokens, chunk in [(1, 1), (8192, 1024), (256, 512)]:
            expected = tokens * token * size + chunk * 320 * 4
            assert activation_bytes(config, tokens, dtype, chunk) == expected
            assert activation_bytes(config, tokens, dtype, chunk, fused=False) == expected
            wide = replace(config, intermediate_size=512)  # fits alone, with its gate it does not
            assert activation_bytes(wide, tokens, dtype, chunk) == expected
            more = expected + tokens * 1024 * size
            assert activation_bytes(wide, tokens, dtype, chunk, fused=False) == more
    # the norm and what the MLP leaves as bytes
    expected = 100 * ((128 + 768 + 512) * 2 + 128 + 256) + 10 * 320 * 4
    assert activation_bytes(config, 100, "float16", 10, "fp8") == expected


def test_what_is_asked_for_is_taken(config):
    assert micro_batch_tokens(100, 5000, config, "float16", 1024, 0) == 100


def test_a_lone_gpu_has_larger_micro_batches(config):
    assert [default_tokens("cuda", 1), default_tokens("cuda", 4)] == [32768, 8192]
    assert default_tokens("cpu", 1) == 8192
    assert micro_batch_tokens(None, 100, config, "float16", 1024, None, default=32768) == 32768


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


MEASURED = sorted((Path(__file__).parents[1] / "bench" / "results").glob("score-*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_what_was_measured_is_predicted_within_five_percent(path):
    """The peak of the device's memory pool, weights and all."""
    measured = json.loads(path.read_text())
    config, quantize = model_config(measured["shape"]), measured["quantize"]
    weights = stage_bytes(config, range(config.num_hidden_layers), np.dtype("float16"), quantize)
    for run in measured["runs"]:
        size, chunk = run["micro_batch_tokens"], reference.LOGIT_CHUNK
        predicted = weights + activation_bytes(config, size, "float16", chunk, quantize)
        assert abs(predicted / run["peak_memory_bytes"] - 1) < 0.05, predicted
