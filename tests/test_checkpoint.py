"""Checkpoints: only what a stage needs is read, and what is wrong with a file is said."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model

from cupyllama.checkpoint.fields import stage_bytes
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.config import load_config
from cupyllama.errors import ModelError
from cupyllama.loading import load_stage
from cupyllama.ops import reference


def load(directory: Path, layers: range | None = None, dtype=np.float32):
    config = load_config(directory)
    layers = range(config.num_hidden_layers) if layers is None else layers
    checkpoint = SafetensorsCheckpoint(directory)
    weights = load_stage(checkpoint, config, layers, np.dtype(dtype), reference)
    return weights, checkpoint, config


def test_fused_matrices_stack_their_parts(tmp_path):
    weights, _, _ = load(write_tiny_model("attention_bias", tmp_path))
    tensors = tiny_tensors("attention_bias")
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}."
        for field, names in {
            "qkv_proj": ["self_attn.q_proj.weight", "self_attn.k_proj.weight"]
            + ["self_attn.v_proj.weight"],
            "qkv_bias": [f"self_attn.{part}_proj.bias" for part in "qkv"],
            "o_bias": ["self_attn.o_proj.bias"],
            "gate_up_proj": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            "down_proj": ["mlp.down_proj.weight"],
        }.items():
            stacked = np.concatenate([tensors[prefix + name] for name in names])
            np.testing.assert_array_equal(getattr(layer, field), stacked)
    np.testing.assert_array_equal(weights.lm_head, tensors["lm_head.weight"])


@pytest.mark.parametrize("saved", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_dtype_is_converted(saved, wanted, tmp_path):
    weights, _, _ = load(write_tiny_model("gqa", tmp_path, dtype=saved), dtype=wanted)
    stored = np.dtype(ml_dtypes.bfloat16 if saved == "bfloat16" else saved)
    expected = tiny_tensors("gqa")["model.embed_tokens.weight"].astype(stored).astype(wanted)
    assert weights.embed_tokens.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(
        weights.embed_tokens.astype(np.float32), expected.astype(np.float32)
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_stage_reads_its_own_bytes_and_no_others(shards, tmp_path):
    directory = write_tiny_model("llama1", tmp_path, shards=shards)
    layers = TINY_MODELS["llama1"]["num_hidden_layers"]
    total = 0
    for layer in range(layers):
        weights, checkpoint, config = load(directory, range(layer, layer + 1))
        assert checkpoint.bytes_read == stage_bytes(config, range(layer, layer + 1), np.float32)
        assert (weights.embed_tokens is not None) == (layer == 0)
        assert (weights.lm_head is not None) == (layer == layers - 1)
        total += checkpoint.bytes_read
    assert total == sum(tensor.nbytes for tensor in tiny_tensors("llama1").values())


def test_tied_embeddings_are_one_array_or_read_where_the_head_is(tmp_path):
    directory = write_tiny_model("tied", tmp_path)
    weights, _, config = load(directory)
    assert weights.lm_head is weights.embed_tokens
    last, _, _ = load(directory, range(1, config.num_hidden_layers))
    assert last.embed_tokens is None
    np.testing.assert_array_equal(last.lm_head, weights.lm_head)


def rewrite(directory: Path, change) -> None:
    """Change the tensors of a one-file checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM = "model.layers.1.post_attention_layernorm.weight"
WRONG_TENSORS = {
    "missing": (lambda t: t.pop(NORM), f"has no tensor {NORM}"),
    "extra": (
        lambda t: t.update({"model.layers.0.lora_A": np.ones(3, np.float32)}),
        "model.safetensors: model.layers.0.lora_A is not a tensor of this model",
    ),
    "misshapen": (
        lambda t: t.update({NORM: np.ones(7, np.float32)}),
        rf"{NORM} is \[7\], but config.json makes it \[",
    ),
    "integers": (
        lambda t: t.update({NORM: np.ones_like(t[NORM], np.int32)}),
        f"{NORM} is stored as I32",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(case, tmp_path):
    change, message = WRONG_TENSORS[case]
    rewrite(write_tiny_model("gqa", tmp_path), change)
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and error.value.exit_code == 3


def test_old_rotary_buffers_and_a_stored_tied_head_are_passed_over(tmp_path):
    expected, _, _ = load(write_tiny_model("tied", tmp_path / "a"))
    directory = shutil.copytree(tmp_path / "a", tmp_path / "b")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float64)}
    extra["lm_head.weight"] = np.zeros((3, 3), np.float32)
    rewrite(directory, lambda tensors: tensors.update(extra))
    found, _, _ = load(directory)
    np.testing.assert_array_equal(found.lm_head, expected.lm_head)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_files_are_named(keep, tmp_path):
    path = write_tiny_model("gqa", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="model.safetensors: truncated or corrupt"):
        load(tmp_path)


def test_corrupt_headers_are_named(tmp_path):
    path = write_tiny_model("gqa", tmp_path) / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[9] = ord("!")
    path.write_bytes(whole)
    with pytest.raises(ModelError, match="truncated or corrupt"):
        load(tmp_path)


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    (write_tiny_model("gqa", tmp_path) / "model.safetensors").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # which another user finds, whatever is above it
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(ModelError) as error:
            SafetensorsCheckpoint(Path())
    finally:
        if root:
            os.seteuid(0)
    assert str(error.value) == "model.safetensors: Permission denied"
    assert error.value.hint == "May this user read the file?"


def test_a_missing_shard_and_a_lying_index_are_named(tmp_path):
    directory = write_tiny_model("gqa", tmp_path / "a", shards=3)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "aside")
    with pytest.raises(ModelError, match=f"{shard.name}: no such file, though model.saf"):
        load(directory)
    (tmp_path / "aside").rename(shard)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = sorted(set(content["weight_map"].values()))[0]
    content["weight_map"]["model.embed_tokens.weight"] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="has no model.*though model.safetensors.index.json says"):
        load(directory)
    index.write_text("{}")
    with pytest.raises(ModelError, match="not an index"):
        load(directory)


def test_no_weights_at_all(tmp_path):
    write_tiny_model("gqa", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no model.safetensors and no"):
        load(tmp_path)


def test_the_digest_tells_models_apart(tmp_path):
    first = write_tiny_model("gqa", tmp_path / "a")
    same = shutil.copytree(first, tmp_path / "b")
    digest = SafetensorsCheckpoint(first).digest()
    assert SafetensorsCheckpoint(same).digest() == digest

    def nudge(tensors):
        tensors["model.norm.weight"][0] += 1

    rewrite(same, nudge)
    assert SafetensorsCheckpoint(same).digest() != digest
