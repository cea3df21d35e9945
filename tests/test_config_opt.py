"""OPT's config.json: what is published is read, and what would change the mathematics refused."""

import json

import pytest
from tiny_models import TINY_MODELS

from cupyllama.config import load_config
from cupyllama.config_opt import OptConfig
from cupyllama.errors import ModelError
from cupyllama.families import config_fields, config_from_fields, family_of

OPT = TINY_MODELS["opt"]


def load(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return load_config(tmp_path)


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


def published(hidden, layers, heads, **others):
    """A config.json of facebook/opt-*."""
    sizes = {
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "word_embed_proj_dim": hidden,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    }
    return OPT | sizes | others


PUBLISHED = {  # parameters of all matrices and tables, in millions, as the paper rounds them
    "opt-125m": (published(768, 12, 12), 64, 125),
    "opt-350m": (
        published(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        64,
        331,
    ),
    "opt-2.7b": (published(2560, 32, 32), 80, 2651),
    "opt-30b": (published(7168, 48, 56), 128, 29974),
    "opt-66b": (published(9216, 64, 72), 128, 65718),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name, tmp_path):
    raw, head_dim, millions = PUBLISHED[name]
    config = load(tmp_path, raw)
    assert isinstance(config, OptConfig) and family_of(config).model.__name__.endswith("opt")
    assert config.head_dim == head_dim and config.num_key_value_heads == config.num_attention_heads
    assert (config.max_length, config.position_rows) == (2048, 2050)
    assert config.tie_word_embeddings and config.bos_token_id == 2 and config.dtype == "float16"
    assert config.do_layer_norm_before == (name != "opt-350m")
    tables = config.position_rows * config.hidden_size + config.head_parameters
    if config.projects:
        tables += config.hidden_size * config.word_embed_proj_dim  # project_in
    total = config.num_hidden_layers * config.layer_parameters + tables
    assert round(total / 1e6) == pytest.approx(millions, rel=2e-3)


def test_defaults_are_those_of_transformers(tmp_path):
    absent = "max_position_embeddings word_embed_proj_dim do_layer_norm_before bos_token_id"
    raw = without(OPT, *absent.split(), "torch_dtype", "activation_function", "dropout")
    config = load(tmp_path, raw)
    assert config.max_position_embeddings == 2048 and config.bos_token_id == 2
    assert config.word_embed_proj_dim == config.hidden_size and not config.projects
    assert config.do_layer_norm_before and config.tie_word_embeddings
    assert config.dtype == "float32"
    for key in ("model_type", "architectures"):
        assert load(tmp_path, without(OPT, key)) == load(tmp_path, OPT)


@pytest.mark.parametrize(
    "harmless",
    [
        {"enable_bias": True, "layer_norm_elementwise_affine": True},
        {"dropout": 0.5, "activation_dropout": 0.1, "layerdrop": 0.1, "init_std": 0.006},
        {"_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": None},
        {"output_projection": None, "prefix": "</s>", "eos_token_id": [2, 50118]},
    ],
)
def test_what_turns_nothing_on_is_accepted(tmp_path, harmless):
    assert load(tmp_path, OPT | harmless) == load(tmp_path, OPT)


REFUSED = {
    "activation": ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
    "no biases": ({"enable_bias": False}, "enable_bias is False, which is not supported"),
    "norms without weights": (
        {"layer_norm_elementwise_affine": False},
        "layer_norm_elementwise_affine is False",
    ),
    "no last norm": ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
    "not causal": ({"architectures": ["OPTForSequenceClassification"]}, "architectures is"),
    "LLaMA's class": ({"architectures": ["LlamaForCausalLM"]}, r"not \['OPTForCausalLM'\]"),
    "norms a text": ({"do_layer_norm_before": "yes"}, "do_layer_norm_before is 'yes'"),
    "heads that do not divide": ({"hidden_size": 130}, "hidden_size 130 is no multiple of 4"),
    "small heads": ({"num_attention_heads": 8}, "head_dim is 16"),
    "odd heads": ({"hidden_size": 132}, "head_dim is 33"),
    "LLaMA's key": ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06 is not known"),
    "LLaMA's harmless key": ({"mlp_bias": False}, "mlp_bias = False is not known"),
    "heads of another size": ({"head_dim": 64}, "head_dim = 64 is not known"),
    "no positions": ({"max_position_embeddings": 63}, "max_position_embeddings is 63"),
    "no embedding": ({"word_embed_proj_dim": 0}, "word_embed_proj_dim is 0"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        r"quantization_config \(gptq\) is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_the_mathematics_is_refused_by_name(case, tmp_path):
    change, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path, OPT | change)
    assert str(tmp_path / "config.json") in str(error.value)
    assert error.value.hint and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["hidden_size", "ffn_dim", "vocab_size", "num_attention_heads"])
def test_a_missing_size_is_named(tmp_path, key):
    with pytest.raises(ModelError, match=f"{key} is missing"):
        load(tmp_path, without(OPT, key))


def test_opts_keys_are_none_of_llamas(tmp_path):
    for key in ("layerdrop", "enable_bias"):
        with pytest.raises(ModelError, match=f"{key} = .* is not known"):
            load(tmp_path, TINY_MODELS["gqa"] | {key: True})


@pytest.mark.parametrize("name", ["opt", "opt_350m", "opt_untied", "gqa", "attention_bias", "tied"])
def test_a_config_comes_back_from_what_is_written_of_it(name, tmp_path):
    config = load(tmp_path, TINY_MODELS[name])
    assert load(tmp_path, config.as_hugging_face()) == config
    fields = json.loads(json.dumps(config_fields(config)))
    assert config_from_fields(fields) == config
    if config.family == "llama":  # as results files had it before there was a second family
        assert config_from_fields(without(fields, "family")) == config
