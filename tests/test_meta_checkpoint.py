"""Meta's consolidated.*.pth and params.json, against the same model in Hugging Face's form."""

import json

import numpy as np
import pytest
from checkpoint_makers import interleave, open_stage, write_meta_model, write_torch
from engine import question_rows, score_rows
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model

from cupyllama.checkpoint.joined import JoinedTensor
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.config import load_config
from cupyllama.config_llama import RopeScaling
from cupyllama.errors import ModelError

# params.json makes the inner size 352 of 128 unless a multiplier says otherwise: 3/4 of 341 = 255.
MODELS = {
    "llama1": {"ffn_dim_multiplier": 0.75},
    "llama3_rope": {"ffn_dim_multiplier": 0.376, "use_scaled_rope": True, "rope_theta": 500000.0},
}
QUESTIONS = [
    {"context": [1, 5, 9, 7, 30, 31], "endings": [[4, 8], [100, 3, 5], [9]]},
    {"context": [1, 5, 9, 8], "endings": [[200, 8], [100, 3, 5]]},
]


def meta(name, directory, parts=1, axis=1, dtype=np.float32, **params):
    tensors = {key: values.astype(dtype) for key, values in tiny_tensors(name).items()}
    return write_meta_model(
        {"num_key_value_heads": 4} | TINY_MODELS[name],
        tensors,
        directory,
        parts,
        axis,
        **MODELS.get(name, {}) | params,
    )


@pytest.mark.parametrize("parts, axis", [(1, 1), (2, 1), (2, 0), (4, 1)])
def test_it_scores_as_hugging_faces_form_bit_for_bit(parts, axis, tmp_path):
    original = write_tiny_model("llama1", tmp_path / "a")
    other = meta("llama1", tmp_path / "b", parts, axis)
    assert open_checkpoint(other).form == "meta"
    assert open_checkpoint(other).digest() == open_checkpoint(original).digest()
    rows = question_rows(QUESTIONS)
    expected = score_rows(open_stage(original), rows).loglikelihoods
    np.testing.assert_array_equal(score_rows(open_stage(other), rows).loglikelihoods, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_range_of_rows_is_right(parts, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("cupyllama.checkpoint.joined._BLOCK_BYTES", 3000)
    checkpoint = open_checkpoint(meta("llama1", tmp_path, parts, dtype=dtype))
    expected = {key: values.astype(dtype) for key, values in tiny_tensors("llama1").items()}
    assert set(checkpoint.tensors) == set(expected)
    total = 0
    for name, values in expected.items():
        for first, last in ((0, len(values)), (0, 1), (13, 50), (31, 97), (127, 128)):
            out = np.empty((last - first, *values.shape[1:]), dtype)
            before = checkpoint.bytes_read
            checkpoint.read_rows(name, first, out)
            np.testing.assert_array_equal(out, values[first:last], err_msg=name)
            if (first, last) == (0, len(values)):
                assert checkpoint.bytes_read - before == values.nbytes
                total += values.nbytes
    joined = {n for n, tensor in checkpoint.tensors.items() if isinstance(tensor, JoinedTensor)}
    assert (len(joined) < len(expected) / 3) == (parts == 1)
    assert all((checkpoint.locate(name) is None) == (name in joined) for name in expected)


def test_the_config_is_that_of_hugging_faces_form(tmp_path):
    expected = load_config(write_tiny_model("llama1", tmp_path / "a"))
    found = load_config(meta("llama1", tmp_path / "b", 2))
    assert found.max_position_embeddings == 4096
    same = found.as_hugging_face() | {"max_position_embeddings": 512}
    assert same == expected.as_hugging_face()


@pytest.mark.parametrize(
    "params, dtype, longest",
    [
        ({}, np.float16, 2048),
        ({}, np.float32, 4096),
        ({"rope_theta": 500000.0}, np.float16, 8192),
        ({"rope_theta": 1e6}, np.float16, 16384),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, np.float16, 131072),
        ({"max_seq_len": 700, "rope_theta": 500000.0}, np.float16, 700),
    ],
)
def test_the_rule_for_the_longest_row(params, dtype, longest, tmp_path):
    assert load_config(meta("llama1", tmp_path, dtype=dtype, **params)).max_length == longest


def test_a_scaled_rope_is_llama3s(tmp_path):
    config = load_config(meta("llama3_rope", tmp_path, 2, 0))
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.intermediate_size == 256 and config.num_key_value_heads == 2


def test_config_json_goes_before_params_json(tmp_path):
    meta("llama1", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY_MODELS["llama1"]))
    assert load_config(tmp_path).max_position_embeddings == 512


REFUSED = {
    "unknown": ({"lora_rank": 8}, "lora_rank = 8 is not known"),
    "vocabulary": ({"vocab_size": 32000}, "vocab_size is 32000, but the embedding has 320"),
    "llama 3.2": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "use_scaled_rope": True},
        "is a LLaMA 3.2",
    ),
    "heads": ({"n_heads": 3}, "do not divide"),
    "head size": ({"n_heads": 8, "n_kv_heads": 8}, "heads of 16"),
    "text": ({"dim": "128"}, "dim is '128'"),
    "nothing": ({"norm_eps": -1}, "norm_eps is -1"),
    "flag": ({"use_scaled_rope": 1}, "use_scaled_rope is 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_params_that_cannot_be_are_refused(case, tmp_path):
    params, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as error:
        load_config(meta("llama1", tmp_path, **params))
    assert "params.json" in str(error.value)


def test_broken_params_are_named(tmp_path):
    path = meta("llama1", tmp_path) / "params.json"
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "n_heads is missing"),
    ):
        path.write_text(content)
        with pytest.raises(ModelError, match=f"params.json: {message}"):
            load_config(tmp_path)


def test_parts_that_do_not_fit_are_named(tmp_path):
    directory = meta("llama1", tmp_path, 2)
    second = directory / "consolidated.01.pth"
    whole = second.read_bytes()
    write_torch(second, {"norm.weight": np.ones(128, np.float32)})
    with pytest.raises(ModelError, match="consolidated.01.pth: has no .*, though consolidated.00"):
        open_checkpoint(directory)
    meta("llama1", tmp_path / "half", 2, dtype=np.float16)
    second.write_bytes((tmp_path / "half" / second.name).read_bytes())
    with pytest.raises(ModelError, match="consolidated.01.pth: .* F16, which does not fit .* F32"):
        open_checkpoint(directory)
    second.write_bytes(whole)
    second.rename(directory / "consolidated.02.pth")
    with pytest.raises(ModelError, match="consolidated.01.pth: no such file"):
        open_checkpoint(directory)
    (directory / "consolidated.02.pth").unlink()
    for refuse in (load_config, open_checkpoint):
        with pytest.raises(ModelError, match="has 1 of 2 parts: consolidated.00.pth$") as error:
            refuse(directory)
        assert error.value.hint.startswith("Is the download complete? params.json has dim 128, and")


@pytest.mark.parametrize("axis", [0, 1])
def test_last_parts_that_are_missing_are_counted(axis, tmp_path):
    """Of LLaMA 3 the embedding has whole rows in each part, so that its shape tells nothing."""
    directory = meta("llama1", tmp_path, 4, axis)
    (directory / "consolidated.03.pth").unlink()
    names = ", ".join(f"consolidated.0{number}.pth" for number in range(3))
    for _ in range(2):
        with pytest.raises(ModelError, match=f"has 3 of 4 parts: {names}$"):
            open_stage(directory)
        (directory / "config.json").write_text(json.dumps(TINY_MODELS["llama1"]))


def test_params_of_another_model_are_no_missing_parts(tmp_path):
    directory = meta("llama1", tmp_path, dim=256, n_heads=8, n_kv_heads=8)
    with pytest.raises(ModelError, match="embed_tokens") as error:
        open_stage(directory)
    assert "parts" not in str(error.value)


def test_missing_params_are_named(tmp_path):
    directory = meta("llama1", tmp_path, 2)
    (directory / "params.json").unlink()
    for refuse in (load_config, open_checkpoint):
        with pytest.raises(ModelError, match="params.json: No such file") as error:
            refuse(directory)
        assert error.value.hint == "Is the download complete?"


def test_tensors_of_another_family_are_named(tmp_path):
    directory = meta("llama1", tmp_path)
    write_torch(directory / "consolidated.00.pth", {"decoder.x": np.ones(3, np.float32)})
    with pytest.raises(ModelError, match="has no tok_embeddings.weight"):
        load_config(directory)
    with pytest.raises(ModelError, match="decoder.x is not a tensor of a LLaMA"):
        open_checkpoint(directory)


def test_the_makers_order_of_rows_is_metas():
    """Rotated pairs are neighbours in Meta's form and half a head apart in Hugging Face's."""
    rows = np.arange(16)[:, None]  # two heads of eight
    expected = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert interleave(rows, 8)[:, 0].tolist() == expected
