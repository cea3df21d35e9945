"""Loading to the GPU: the very bits that the CPU gets, and a clean end however it ends."""

import gc
import os
import threading

import cupy
import numpy as np
import pytest
from test_loading import DTYPES, Derived, assert_same, check_load, naive
from test_quantization import assert_same as assert_same_quantized
from test_quantization import every_kind, truth, write_strange_model
from tiny_models import write_tiny_model

from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.checkpoint.shard import ShardOptions, shard
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.config import load_config
from cupyllama.errors import ModelError
from cupyllama.loading import load_stage
from cupyllama.ops import cuda

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_thread_left_behind():
    before = own_threads()
    yield
    assert own_threads() == before


def own_threads():
    """All but the one that tqdm starts with its first bar, and keeps."""
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


@pytest.mark.parametrize("kind", [SafetensorsCheckpoint, Derived])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_every_pair_of_dtypes(saved, wanted, kind, tmp_path):
    directory = write_tiny_model("attention_bias", tmp_path, dtype=saved, shards=3)
    check_load(directory, cuda, DTYPES[wanted], kind, threads=3, piece_bytes=4099)


@pytest.mark.parametrize("name", ["odd", "tied"])
@pytest.mark.parametrize(("threads", "piece_bytes"), [(1, 5001), (12, 1002), (4, 1 << 20)])
def test_pieces_of_any_size(name, threads, piece_bytes, tmp_path):
    directory = write_tiny_model(name, tmp_path, dtype="float16")
    check_load(directory, cuda, np.float16, threads=threads, piece_bytes=piece_bytes)


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_any_number_of_buffers(buffers, tmp_path):
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    cut = {"threads": 3, "piece_bytes": 999, "buffers": buffers}
    check_load(directory, cuda, np.float16, **cut)


@pytest.mark.parametrize("kind", [SafetensorsCheckpoint, Derived])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize(("threads", "piece_bytes"), [(1, 5001), (12, 1002), (4, 1 << 20)])
@every_kind
def test_rows_quantized_on_the_way(quantize, threads, piece_bytes, saved, kind, tmp_path):
    directory = write_strange_model(tmp_path, dtype=saved)
    config, layers = load_config(directory), range(3)
    weights = load_stage(
        *(kind(directory), config, layers, np.dtype(np.float16), cuda),
        threads=threads,
        piece_bytes=piece_bytes,
        quantize=quantize,
    )
    assert_same_quantized(weights, truth(directory, layers, np.float16, quantize), layers)


@every_kind
def test_quantized_by_shard(quantize, tmp_path):
    directory = write_strange_model(tmp_path / "m", dtype="bfloat16")
    shard(ShardOptions(directory, tmp_path / "out", 2, quantize=quantize, quiet=True))
    checkpoint, config = open_checkpoint(tmp_path / "out"), load_config(directory)
    for layers in (range(3), range(1, 2)):
        weights = load_stage(
            *(checkpoint, config, layers, np.dtype(np.float16), cuda),
            piece_bytes=3001,
            quantize=quantize,
        )
        assert_same_quantized(weights, truth(directory, layers, np.float16, quantize), layers)


@pytest.mark.parametrize("quantize", [None, "fp8", "int8"])
def test_memory_comes_back_with_the_last_array(quantize, tmp_path):
    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    pool = cupy.get_default_memory_pool()
    gc.collect()
    before = pool.used_bytes()
    weights = load_stage(
        checkpoint, config, range(2), np.dtype(np.float16), cuda, quantize=quantize
    )
    assert pool.used_bytes() - before < 1.1 * stage_bytes(config, range(2), np.float16, quantize)
    norm = weights.norm
    del weights
    assert pool.used_bytes() > before
    del norm
    assert pool.used_bytes() == before


def test_the_defaults(tmp_path):
    check_load(write_tiny_model("llama_tokenizer", tmp_path, shards=2), cuda, np.float16)


def test_memory_still_in_use_by_queued_kernels_is_not_written_to(tmp_path):
    """CuPy's pool hands an array's memory out again before the kernels that use it have run."""
    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    stage = (config, range(2), np.dtype(np.float32))
    for array in [cupy.empty(1 << 27, np.float32), *_arrays(load_stage(checkpoint, *stage, cuda))]:
        for _ in range(20):
            array.fill(7)
    del array
    expected = naive(checkpoint, config, range(2), np.float32)
    assert_same(load_stage(checkpoint, *stage, cuda), expected, range(2))


def _arrays(weights):
    return [
        array for layer in weights.layers for array in vars(layer).values() if array is not None
    ]


def test_a_file_that_ends_early_is_named_and_memory_comes_back(tmp_path):
    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    with pytest.raises(ModelError, match="model.safetensors: ends inside"):
        load_stage(checkpoint, config, range(2), np.dtype(np.float16), cuda, piece_bytes=1000)
    gc.collect()  # the error's traceback held the arrays
    assert pool.used_bytes() == before


def test_memory_that_ends_is_told(tmp_path):
    directory = write_tiny_model("llama_tokenizer", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(pool.total_bytes() + (1 << 20))
    try:
        with pytest.raises(MemoryError):
            load_stage(checkpoint, config, range(2), np.dtype(np.float32), cuda)
    finally:
        pool.set_limit(0)
