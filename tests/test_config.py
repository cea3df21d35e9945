"""config.json: both spellings of transformers, and the refusal of all that is not known."""

import json

import pytest
from tiny_models import TINY_MODELS

from cupyllama.config import RopeScaling, load_config
from cupyllama.errors import ModelError

LLAMA = TINY_MODELS["gqa"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def load(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return load_config(tmp_path)


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


def test_transformers_4_and_5_say_the_same(tmp_path):
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16"}
    new = without(old, "rope_theta", "rope_scaling", "torch_dtype")
    new |= {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "dtype": "bfloat16"}
    config = load(tmp_path, old)
    assert config == load(tmp_path, new)
    assert config.rope_theta == 5e5 and config.dtype == "bfloat16"
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_defaults_of_the_first_llama(tmp_path):
    keys = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias")
    raw = without(
        LLAMA | {"num_attention_heads": 2},
        *keys,
        "tie_word_embeddings",
        "torch_dtype",
        "max_position_embeddings",
    )
    config = load(tmp_path, raw)
    assert config.num_key_value_heads == raw["num_attention_heads"]
    assert config.head_dim == raw["hidden_size"] // raw["num_attention_heads"]
    assert (config.rope_theta, config.rope_scaling, config.dtype) == (10000.0, None, "float32")
    assert config.max_length == 2048


def test_old_spelling_of_linear_scaling(tmp_path):
    config = load(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_a_sliding_window_bounds_the_row(tmp_path):
    raw = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    raw |= {"sliding_window": 64, "max_position_embeddings": 512}
    assert load(tmp_path, raw).max_length == 64
    assert load(tmp_path, raw | {"sliding_window": None}).max_length == 512


@pytest.mark.parametrize(
    "harmless",
    [
        {"use_cache": False, "_name_or_path": "x", "pad_token_id": None},
        {"some_new_feature": False, "another": None},
        {"eos_token_id": [2, 3], "pretraining_tp": 2, "attention_dropout": 0.1},
    ],
)
def test_what_turns_nothing_on_is_accepted(tmp_path, harmless):
    assert load(tmp_path, LLAMA | harmless) == load(tmp_path, LLAMA)


REFUSED = {
    "unknown architecture": ({"model_type": "gpt_neox"}, "unknown architecture 'gpt_neox'"),
    "not causal": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is true"),
    "unknown key": ({"logit_scale": 0.5}, "logit_scale = 0.5 is not known"),
    "unknown zero": ({"final_logit_softcapping": 0}, "final_logit_softcapping = 0 is not known"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        r"quantization_config \(gptq\) is not supported",
    ),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "yarn rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
    "rope extra": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
        "rope_scaling has 'beta_fast'",
    ),
    "rope without factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "head size": ({"head_dim": 16}, "head_dim is 16"),
    "odd head size": ({"head_dim": 33}, "head_dim is 33"),
    "kv heads": ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "text": ({"vocab_size": "32000"}, "vocab_size is '32000'"),
    "dtype": ({"torch_dtype": "float64"}, "dtype is 'float64'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(case, tmp_path):
    change, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path, LLAMA | change)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_missing_size_is_named(tmp_path, key):
    with pytest.raises(ModelError, match=f"{key} is missing"):
        load(tmp_path, without(LLAMA, key))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="config.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(ModelError, match="not valid JSON"):
        load_config(tmp_path)
