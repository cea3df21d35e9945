"""config.json: both spellings of transformers, and the refusal of all that is not known."""

import json
import math
from pathlib import Path

import pytest
from tiny_models import TINY_MODELS

from cupyllama.config import ModelConfig, load_config
from cupyllama.config_llama import RopeScaling
from cupyllama.errors import ModelError

LLAMA = TINY_MODELS["gqa"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


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
        {"another": None, "is_causal": True, "rope_interleaved": False, "auto_map": {}},
        {"is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "mlp_bias": None},
        {"neftune_noise_alpha": 5.0, "mlp_dropout": 0.1, "resid_dropout": 0, "pruned_heads": {}},
        {"hidden_act": "silu", "activation": "swiglu", "use_sliding_window": False},
        {"architectures": ["LLaMAForCausalLM"], "sliding_window": None, "torchscript": False},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0}, "is_decoder": False},
        {"rope_scaling": {"type": "default", "original_max_position_embeddings": None}},
        {"rope_parameters": {"rope_theta": LLAMA["rope_theta"], "partial_rotary_factor": 1.0}},
        {"eos_token_id": [2, 3], "pretraining_tp": 2, "attention_dropout": 0.1},
    ],
)
def test_what_turns_nothing_on_is_accepted(tmp_path, harmless):
    assert load(tmp_path, LLAMA | harmless) == load(tmp_path, LLAMA)


REFUSED = {
    "unknown architecture": ({"model_type": "gpt_neox"}, "unknown architecture 'gpt_neox'"),
    "not causal": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "no model type": ({"model_type": None, "architectures": None}, "has neither model_type nor"),
    "model type a list": ({"model_type": ["llama"]}, r"unknown architecture \['llama'\]"),
    "architectures a text": ({"architectures": "LlamaForCausalLM"}, "architectures is 'Llama"),
    "two architectures": ({"architectures": ["LlamaForCausalLM"] * 2}, "architectures is"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "other activation": ({"activation": "gelu"}, "activation is 'gelu', which is not supported"),
    "custom code": ({"auto_map": {"AutoModel": "my.Model"}}, "auto_map is .*not supported"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*not supported"),
    "interleaved": ({"rope_interleaved": True}, "rope_interleaved is True"),
    "not causal mask": ({"is_causal": False}, "is_causal is False, which is not supported"),
    "unknown false": ({"use_rope": False}, "use_rope = False is not known"),
    "dropout that is a text": ({"mlp_dropout": "all"}, "mlp_dropout = 'all' is not known"),
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
    "factor without type": ({"rope_scaling": {"factor": 2}}, "has factor 2, but no rope_type"),
    "default with factor": (
        {"rope_scaling": {"rope_type": "default", "factor": 2}},
        "has factor 2, but no rope_type that uses it",
    ),
    "both spellings of the type": (
        {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2.0}},
        "has both type and rope_type, and they differ",
    ),
    "both spellings of the scaling": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": LLAMA3},
        "has both rope_scaling and rope_parameters, and they differ",
    ),
    "two thetas": (
        {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 5e5}},
        "rope_theta is 10000.0, but 500000 inside rope_parameters",
    ),
    "no theta": ({"rope_theta": 0}, "rope_theta is 0"),
    "negative theta inside": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": -1}},
        "rope_parameters.rope_theta is -1",
    ),
    "llama3 bounds": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "has high_freq_factor 1, and low_freq_factor 1",
    ),
    "rope a text": ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
    "partial rotation inside": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        "rope_scaling.partial_rotary_factor is 0.5",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "heads that do not divide": (
        {"head_dim": None, "hidden_size": 130},
        "hidden_size 130 is no multiple of 8",
    ),
    "window on a llama": ({"sliding_window": 64}, "sliding_window is 64, but LLaMA has none"),
    "empty window": (MISTRAL | {"sliding_window": 0}, "sliding_window is 0"),
    "window a text": (MISTRAL | {"sliding_window": "abc"}, "sliding_window is 'abc'"),
    "infinite": ({"hidden_size": math.inf}, "hidden_size is inf"),
    "no number": ({"hidden_size": math.nan}, "hidden_size is nan"),
    "no number, not whole": ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
    "half": ({"hidden_size": 128.5}, "hidden_size is 128.5"),
    "a flag as a number": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "beyond float": ({"rope_theta": 10**400}, "rope_theta is 10"),
    "a flag as a text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
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
    assert error.value.hint and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size"])
def test_a_missing_size_is_named(tmp_path, key):
    with pytest.raises(ModelError, match=f"{key} is missing"):
        load(tmp_path, without(LLAMA, key))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelError, match="no such directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="config.json: no such file"):
        load_config(tmp_path)
    for content in (b'{"hidden_size": ', b"[" * 100000, b"\xff\xfe{"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match="config.json: not valid JSON"):
            load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load_config(tmp_path)


def test_a_file_instead_of_its_directory(tmp_path):
    load(tmp_path, LLAMA)
    with pytest.raises(ModelError, match=r"config.json: is a file") as error:
        load_config(tmp_path / "config.json")
    assert error.value.hint.endswith(str(tmp_path))


def test_a_directory_that_may_not_be_searched(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="config.json: File name too long"):
        load_config(tmp_path / ("m" * 300))

    def denied(self, **options):  # as for any user but root in a directory without the x bit
        raise PermissionError(13, "Permission denied")

    for question in ("exists", "is_file", "read_bytes"):
        monkeypatch.setattr(Path, question, denied)
    with pytest.raises(ModelError, match="config.json: Permission denied"):
        load_config(tmp_path)


def test_precedence_and_defaults(tmp_path):
    """Each pair of spellings, the newer one first."""
    both = load(tmp_path, LLAMA | {"dtype": "bfloat16", "torch_dtype": "float16"})
    assert both.dtype == "bfloat16"
    assert load(tmp_path, LLAMA | {"torch_dtype": "torch.float16"}).dtype == "float16"
    assert load(tmp_path, without(LLAMA, "rms_norm_eps")).rms_norm_eps == 1e-6
    same = {"type": "linear", "rope_type": "linear", "factor": 4.0}
    twice = load(tmp_path, LLAMA | {"rope_scaling": same, "rope_parameters": same})
    assert twice.rope_scaling == RopeScaling("linear", 4.0)
    inside = load(tmp_path, without(LLAMA, "rope_theta") | {"rope_parameters": {"rope_theta": 7}})
    assert (inside.rope_theta, inside.rope_scaling) == (7.0, None)


def test_mistral_has_defaults_of_its_own(tmp_path):
    """transformers' MistralConfig."""
    absent = ("max_position_embeddings", "num_key_value_heads", "sliding_window")
    config = load(tmp_path, without(LLAMA, *absent) | MISTRAL)
    assert (config.sliding_window, config.max_position_embeddings) == (4096, 131072)
    assert config.num_key_value_heads == 8
    assert load(tmp_path, LLAMA | MISTRAL | {"sliding_window": None}).sliding_window is None


def published(hidden, inner, layers, heads, vocab, length, **others):
    """A config.json with the keys that all of the published ones have."""
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
    }
    common = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
    }
    return common | sizes | others


V4 = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1}
LLAMA_31 = LLAMA3 | {"factor": 8.0}
PUBLISHED = {
    "llama-7b-hf": (
        published(4096, 11008, 32, 32, 32000, 2048)
        | {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1},
        {"head_dim": 128, "rope_theta": 1e4, "max_length": 2048, "num_key_value_heads": 32},
    ),
    "Llama-2-7b-hf": (
        published(4096, 11008, 32, 32, 32000, 4096, num_key_value_heads=32, rope_scaling=None)
        | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1},
        {"head_dim": 128, "rope_theta": 1e4, "max_length": 4096},
    ),
    "Llama-3.1-8B": (
        published(4096, 14336, 32, 32, 128256, 131072, num_key_value_heads=8, **V4)
        | {"rope_scaling": LLAMA_31, "rope_theta": 500000.0, "eos_token_id": [128001, 128008]},
        {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), "rope_theta": 5e5},
    ),
    "Llama-3.2-1B": (
        published(2048, 8192, 16, 32, 128256, 131072, num_key_value_heads=8, **V4)
        | {"rope_scaling": LLAMA_31 | {"factor": 32.0}, "rope_theta": 500000.0, "head_dim": 64}
        | {"tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        {"tie_word_embeddings": True, "head_dim": 64, "dtype": "bfloat16"},
    ),
    "Mistral-7B-v0.1": (
        published(4096, 14336, 32, 32, 32000, 32768, num_key_value_heads=8, sliding_window=4096)
        | MISTRAL,
        {"max_length": 4096, "max_position_embeddings": 32768, "num_key_value_heads": 8},
    ),
    "TinyLlama-1.1B": (
        published(2048, 5632, 22, 32, 32000, 2048, num_key_value_heads=4, rope_scaling=None)
        | {"attention_bias": False, "pretraining_tp": 1, "rope_theta": 10000.0},
        {"head_dim": 64, "kv_size": 256},
    ),
    "open_llama_3b": (
        published(3200, 8640, 26, 32, 32000, 2048, pad_token_id=0),
        {"head_dim": 100, "rms_norm_eps": 1e-5},
    ),
    "Yi-6B": (
        published(4096, 11008, 32, 32, 64000, 4096, num_key_value_heads=4, pad_token_id=0)
        | {"rope_theta": 5000000.0, "rope_scaling": None, "pretraining_tp": 1},
        {"rope_theta": 5e6, "kv_size": 512},
    ),
    "CodeLlama-7b-hf": (
        published(4096, 11008, 32, 32, 32016, 16384, num_key_value_heads=32)
        | {"rope_theta": 1000000, "rope_scaling": None, "pretraining_tp": 1},
        {"rope_theta": 1e6, "max_length": 16384},
    ),
    "SmolLM2-135M": (
        published(576, 1536, 30, 9, 49152, 8192, num_key_value_heads=3, **V4)
        | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000}
        | {"rope_scaling": None, "tie_word_embeddings": True}
        | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        {"head_dim": 64, "num_key_value_heads": 3},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name, tmp_path):
    raw, expected = PUBLISHED[name]
    config = load(tmp_path, raw)
    assert isinstance(config, ModelConfig)
    assert {key: getattr(config, key) for key in expected} == expected


OTHERS = {
    "Qwen2": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
        "unknown architecture 'qwen2'",
    ),
    "Gemma": (
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 256},
        "unknown architecture 'gemma'",
    ),
    "Phi-3": (
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
        "unknown architecture 'phi3'",
    ),
    "by its class alone": (
        {"model_type": None, "architectures": ["Qwen2ForCausalLM"]},
        "unknown architecture 'Qwen2ForCausalLM'",
    ),
    "GPTQ": (
        {"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "gptq"}},
        r"quantization_config \(gptq\)",
    ),
    "LongRoPE": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rope_type 'longrope'",
    ),
    "YaRN": (
        {"rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True}},
        "rope_type 'yarn'",
    ),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is dynamic"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_published_models_of_another_kind_are_refused_by_name(name, tmp_path):
    change, message = OTHERS[name]
    raw = published(4096, 11008, 32, 32, 32000, 4096, num_key_value_heads=32)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, raw | change)
