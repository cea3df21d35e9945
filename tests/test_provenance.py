"""Digests change with what they are of, and with nothing else; versions name what is used."""

import hashlib
import importlib.metadata
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import TINY_MODELS, weights_crc32, write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.config import load_config
from cupyllama.parallel.devices import choose_device
from cupyllama.provenance import config_json, digests, versions
from cupyllama.tasks.files import load_task


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(write_tiny_model("llama3_rope", tmp_path / "model"))
    record = {"query": "2 + 2 =", "choices": ["4", "5"], "gold": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "transformers_loglikelihoods.json").read_text())["weights_crc32"]


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_recorded_results_are_of_these_weights(name):
    """If this fails, the weights have changed since; if only others do, the engine is wrong."""
    assert weights_crc32(name) == RECORDED[name]


def test_lm_eval_was_recorded_over_these_weights():
    assert sorted(RECORDED) == sorted(TINY_MODELS)
    recorded = json.loads((DATA / "lm_eval_hellaswag.json").read_text())
    assert recorded["weights_crc32"] == weights_crc32(recorded["model"])


def taken(folder):
    model = folder / "model"
    data = load_task(folder / "q.jsonl", "lm-eval").digest
    return digests(open_checkpoint(model), load_config(model), model / "tokenizer.model", data)


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_files_digests_are_their_sha256(folder):
    found = taken(folder)
    for name, path in [("tokenizer", "model/tokenizer.model"), ("data", "q.jsonl")]:
        assert found[name] == hashlib.sha256((folder / path).read_bytes()).hexdigest()


def test_both_files_of_a_bpe_count(folder):
    model = folder / "model"
    for prefix in ("", "gpt2-"):
        names = [f"{prefix}vocab.json", f"{prefix}merges.txt"]
        for name in names:
            (model / name).write_text(name)
        checkpoint, config = open_checkpoint(model), load_config(model)
        found = {digests(checkpoint, config, model / name, "x")["tokenizer"] for name in names}
        assert found == {hashlib.sha256("".join(names).encode()).hexdigest()}
        for name in names:
            (model / name).write_text("other")
            found.add(digests(checkpoint, config, model / name, "x")["tokenizer"])
        assert len(found) == 3


def test_a_digest_changes_with_what_it_is_of(folder):
    before = taken(folder)
    assert taken(folder) == before

    tokenizer = folder / "model" / "tokenizer.model"
    whole = tokenizer.read_bytes()
    write_tokenizer(folder / "model", 321)
    assert changed(before, taken(folder)) == {"tokenizer"}
    tokenizer.write_bytes(whole)

    data = folder / "q.jsonl"
    data.write_text(data.read_text() + "\n")
    assert changed(before, taken(folder)) == {"data"}
    before = taken(folder)

    weights = folder / "model" / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    norm = tensors["model.norm.weight"]
    norm[0] = np.nextafter(norm[0], np.float32(9))
    save_file(tensors, weights, metadata={"format": "pt"})
    assert changed(before, taken(folder)) == {"model"}
    weights.write_bytes(whole)
    assert taken(folder) == before

    config = folder / "model" / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"rms_norm_eps": 2e-5}))
    assert changed(before, taken(folder)) == {"model"}
    config.write_text(json.dumps(raw | {"transformers_version": "9"}))  # says nothing of the model
    assert taken(folder) == before


def test_a_config_is_the_same_text_in_every_release(folder):
    config = load_config(folder / "model")
    text = config_json(config)
    fields = json.loads(text)
    assert list(fields) == sorted(fields)
    assert fields["rope_scaling"]["factor"] == 8.0
    # what is off is not there: a field of a later release would not be either
    assert "sliding_window" not in fields and "attention_bias" not in fields
    for change in ({"sliding_window": 64}, {"attention_bias": True}, {"bos_token_id": 0}):
        assert config_json(replace(config, **change)) != text
    assert "bos_token_id" in config_json(replace(config, bos_token_id=0))


def test_versions(monkeypatch):
    device, _ = choose_device("cpu")
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    found = versions(device)
    packages = ("numpy", "ml_dtypes", "safetensors", "sentencepiece", "threadpoolctl")
    assert {name: found[name] for name in packages} == {
        name: importlib.metadata.version(name) for name in packages
    }
    assert set(found) == {"cupyllama", "python", *packages}
    monkeypatch.setitem(sys.modules, "tokenizers", object())
    assert versions(device)["tokenizers"] == importlib.metadata.version("tokenizers")
