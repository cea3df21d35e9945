"""config.json to a ModelConfig; what is not known and could change the mathematics is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyllama.errors import ModelError

DTYPES = ("float32", "float16", "bfloat16")

# Families that share LLaMA's equations.
_LLAMA_LIKE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Keys that say nothing about the forward pass of a trained model. A key that is in neither this
# set nor ModelConfig is refused, unless its value is null or false: then it turns nothing on.
_WITHOUT_EFFECT = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id decoder_start_token_id sep_token_id
    attention_dropout hidden_dropout pretraining_tp return_dict output_hidden_states
    output_attentions use_return_dict torchscript use_bfloat16 is_decoder is_encoder_decoder
    add_cross_attention tie_encoder_decoder cross_attention_hidden_size pruned_heads
    chunk_size_feed_forward problem_type id2label label2id finetuning_task task_specific_params
    tokenizer_class prefix name_or_path max_sequence_length max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens bad_words_ids tf_legacy_loss attn_implementation unsloth_version
    unsloth_fixed auto_map
    """.split()
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; the last three fields are llama3's."""

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define the model, under config.json's own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    sliding_window: int | None
    attention_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    dtype: str  # as the checkpoint was saved

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    @property
    def max_length(self) -> int:
        """The longest row whose attention this model sees whole, in tokens."""
        window = self.sliding_window or self.max_position_embeddings
        return min(self.max_position_embeddings, window)

    @property
    def layer_parameters(self) -> int:
        """Weights of the four matrices of one decoder layer, fused as they are multiplied."""
        attention = self.qkv_size * self.hidden_size + self.hidden_size * self.q_size
        return attention + 3 * self.hidden_size * self.intermediate_size


def load_config(model: Path) -> ModelConfig:
    """Read `model`/config.json, as transformers 4 or 5 wrote it, or else Meta's params.json.

    Raises:
        ModelError: no such file, not JSON, an unknown architecture, a missing or impossible
            value, or a key whose meaning is not known.
    """
    path = model / "config.json"
    if not model.exists():
        raise ModelError(f"{model}: no such directory", "--model takes a checkpoint directory.")
    if not path.is_file():
        from cupyllama.checkpoint.meta import has_meta, load_meta_config

        if has_meta(model):
            return load_meta_config(model)
        raise ModelError(
            f"{path}: no such file", "A Hugging Face checkpoint directory has a config.json."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}", "Is the download complete?") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: not a JSON object")
    return _Reader(path, raw).config()


class _Reader:
    """Takes keys out of config.json one by one; what is left over must have no effect."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path = path
        self.left = dict(raw)

    def refuse(self, what: str, hint: str = "") -> ModelError:
        return ModelError(f"{self.path}: {what}", hint)

    def take(self, key: str, default: Any = None) -> Any:
        value = self.left.pop(key, None)
        return default if value is None else value

    def number(self, key: str, kind: type, default: Any = None, least: float = 1) -> Any:
        value = self.take(key, default)
        if value is None:
            raise self.refuse(f"{key} is missing")
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not valid or value != kind(value) or not value >= least:
            raise self.refuse(f"{key} is {value!r}, which cannot be")
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, not true or false")
        return value

    def config(self) -> ModelConfig:
        self.architecture()
        hidden_size = self.number("hidden_size", int)
        heads = self.number("num_attention_heads", int)
        kv_heads = self.number("num_key_value_heads", int, default=heads)
        head_dim = self.number("head_dim", int, default=hidden_size // heads)
        if heads % kv_heads:
            raise self.refuse(f"{heads} attention heads cannot share {kv_heads} key-value heads")
        if not 32 <= head_dim <= 256 or head_dim % 2:
            raise self.refuse(f"head_dim is {head_dim}; even sizes from 32 to 256 are supported")
        if (act := self.take("hidden_act", "silu")) not in ("silu", "swish"):
            raise self.refuse(f"hidden_act is {act!r}; only silu is supported")
        if self.flag("mlp_bias"):
            raise self.refuse("mlp_bias is true, which is not supported")
        theta, scaling = self.rope()
        window = self.take("sliding_window")
        config = ModelConfig(
            vocab_size=self.number("vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=self.number("intermediate_size", int),
            num_hidden_layers=self.number("num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=self.number("rms_norm_eps", float, default=1e-6, least=0),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=self.number("max_position_embeddings", int, default=2048),
            sliding_window=None if window is None else int(window),
            attention_bias=self.flag("attention_bias"),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            bos_token_id=self.token_id("bos_token_id"),
            dtype=self.dtype(),
        )
        self.refuse_leftovers()
        return config

    def architecture(self) -> None:
        model_type = self.take("model_type")
        architectures = self.take("architectures", [])
        if model_type is None and len(architectures) == 1:
            by_class = {name: kind for kind, name in _LLAMA_LIKE.items()}
            model_type = by_class.get(architectures[0], architectures[0])
        if model_type not in _LLAMA_LIKE:
            raise self.refuse(
                f"unknown architecture {model_type!r}",
                f"Supported model types: {', '.join(_LLAMA_LIKE)}.",
            )
        if architectures and architectures != [_LLAMA_LIKE[model_type]]:
            raise self.refuse(
                f"architectures is {architectures}, not [{_LLAMA_LIKE[model_type]!r}]",
                "Only causal language models can be scored.",
            )

    def rope(self) -> tuple[float, RopeScaling | None]:
        """rope_theta and rope_scaling (transformers 4), or both in rope_parameters (5)."""
        old, new = self.take("rope_scaling"), self.take("rope_parameters")
        if old is not None and new is not None and old != new:
            raise self.refuse("has both rope_scaling and rope_parameters, and they differ")
        key = "rope_parameters" if new is not None else "rope_scaling"
        raw = old if new is None else new
        if not isinstance(raw if raw is not None else {}, dict):
            raise self.refuse(f"{key} is {raw!r}, not an object")
        inner = _Reader(self.path, raw or {})
        kind = inner.take("rope_type") or inner.left.get("type") or "default"
        if inner.take("type", kind) != kind:
            raise self.refuse(f"{key} has both type and rope_type, and they differ")
        theta = self.number("rope_theta", float, default=10000.0, least=0)
        theta = inner.number("rope_theta", float, default=theta, least=0)
        if (partial := self.take("partial_rotary_factor", 1.0)) != 1.0:
            raise self.refuse(f"partial_rotary_factor is {partial!r}; only 1.0 is supported")
        if (partial := inner.take("partial_rotary_factor", 1.0)) != 1.0:
            raise self.refuse(f"{key}.partial_rotary_factor is {partial!r}; only 1.0 is supported")
        scaling = self.scaling(key, kind, inner)
        for name in inner.left:
            raise self.refuse(f"{key} has {name!r}, which is not known for rope_type {kind!r}")
        return theta, scaling

    def scaling(self, key: str, kind: Any, inner: "_Reader") -> RopeScaling | None:
        if kind == "default":
            inner.take("factor")
            return None
        if kind == "linear":
            return RopeScaling("linear", inner.number("factor", float, least=1))
        if kind == "llama3":
            scaling = RopeScaling(
                "llama3",
                inner.number("factor", float, least=1),
                inner.number("low_freq_factor", float, least=0),
                inner.number("high_freq_factor", float, least=0),
                inner.number("original_max_position_embeddings", int),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                raise self.refuse(f"{key}: high_freq_factor must be above low_freq_factor")
            return scaling
        if kind == "dynamic":
            raise self.refuse(
                f"{key} is dynamic, which is not supported",
                "Its frequencies depend on the length of the row, so rows of different lengths "
                "could not share the keys of a common prefix.",
            )
        raise self.refuse(
            f"{key} has rope_type {kind!r}, which is not supported",
            "Supported: default, linear, llama3.",
        )

    def token_id(self, key: str) -> int | None:
        value = self.take(key)
        return value if isinstance(value, int) and value >= 0 else None

    def dtype(self) -> str:
        """`dtype` (transformers 5), else `torch_dtype` (4), else float32 as they assume."""
        new, old = self.take("dtype"), self.take("torch_dtype")
        name = str(new or old or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise self.refuse(f"dtype is {name!r}", f"Supported: {', '.join(DTYPES)}.")
        return name

    def refuse_leftovers(self) -> None:
        if (quantization := self.left.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise self.refuse(
                f"quantization_config ({method}) is not supported",
                "Give the checkpoint that it was quantised from.",
            )
        for key, value in self.left.items():
            turned_off = value is None or value is False
            if not (turned_off or key in _WITHOUT_EFFECT or key.startswith("_")):
                raise self.refuse(
                    f"{key} = {value!r} is not known, and may change the mathematics",
                    "Remove the key if it has no effect on the forward pass.",
                )
