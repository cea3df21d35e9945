"""config.json to a ModelConfig; what is not known and could change the mathematics is refused."""

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyllama.errors import ModelError

DTYPES = ("float32", "float16", "bfloat16")

# Families that share LLaMA's equations, and their classes: the first conversions wrote LLaMA.
_LLAMA_LIKE = {
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM"),
    "mistral": ("MistralForCausalLM",),
}

# What transformers assumes for keys that are not there, where that is not what it assumes of LLaMA.
_DEFAULTS = {
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }
}

# A key is read, or in one of these two tables, or refused: false may switch mathematics off just as
# true may switch it on. Null says nothing, and transformers writes nulls.
#
# Keys that say nothing about the forward pass of a trained model, whatever their value. So does
# *_dropout, which is for training.
_WITHOUT_EFFECT = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id decoder_start_token_id sep_token_id
    pretraining_tp return_dict output_hidden_states output_attentions use_return_dict torchscript
    use_bfloat16 is_decoder cross_attention_hidden_size chunk_size_feed_forward problem_type
    id2label label2id finetuning_task task_specific_params tokenizer_class prefix name_or_path
    max_sequence_length model_max_length max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens bad_words_ids tf_legacy_loss attn_implementation unsloth_version
    unsloth_fixed neftune_noise_alpha is_llama_config transformers.js_config
    """.split()
)

# Keys that change nothing at these values alone.
_ONLY = {
    "activation": ("silu", "swiglu"),  # hidden_act decides
    "add_cross_attention": (False,),
    "auto_map": ({},),  # code that the checkpoint brings with it
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({}, []),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_sliding_window": (False,),
}
_IF_HARMLESS = "Remove the key if it has no effect on the forward pass."

# A size beyond it is a mistake, and it is the end of what int() and float() can be trusted with.
_MOST = 1e12

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


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
    try:
        text = path.read_bytes()
    except NotADirectoryError as error:
        raise ModelError(
            f"{model}: is a file", f"--model takes the directory that it is in: {model.parent}"
        ) from error
    except FileNotFoundError as error:
        if not model.exists():
            hint = "--model takes a checkpoint directory."
            raise ModelError(f"{model}: no such directory", hint) from error
        from cupyllama.checkpoint.meta import has_meta, load_meta_config

        if has_meta(model):
            return load_meta_config(model)
        raise ModelError(
            f"{path}: no such file", "A Hugging Face checkpoint directory has a config.json."
        ) from error
    except OSError as error:  # among them a directory that may not be searched
        hint = "May this user read the checkpoint directory?"
        raise ModelError(f"{path}: {error.strerror}", hint) from error
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}", "Is the download complete?") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: not a JSON object", "Is the download complete?")
    return _Reader(path, raw).config()


class _Reader:
    """Takes keys out of config.json one by one; what is left over must have no effect."""

    def __init__(self, path: Path, raw: dict[str, Any], prefix: str = ""):
        """`prefix`: what stands before a key in messages."""
        self.path = path
        self.left = dict(raw)
        self.prefix = prefix

    def refuse(self, what: str, hint: str = "") -> ModelError:
        return ModelError(f"{self.path}: {what}", hint)

    def take(self, key: str, default: Any = None) -> Any:
        value = self.left.pop(key, None)
        return default if value is None else value

    def number(
        self,
        key: str,
        kind: type,
        default: Any = None,
        least: float = 1,
        above: float = float("-inf"),
    ) -> Any:
        value = self.take(key, default)
        name = self.prefix + key
        if value is None:
            raise self.refuse(f"{name} is missing", "Is the download complete?")
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (valid and least <= value < _MOST and value > above and value == kind(value)):
            bound = f"of {least} or more" if least > above else f"above {above}"
            noun = "a whole number" if kind is int else "a number"
            raise self.refuse(f"{name} is {_SHORT.repr(value)}", f"Expected: {noun} {bound}.")
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {_SHORT.repr(value)}", "Expected: true or false.")
        return value

    def config(self) -> ModelConfig:
        model_type = self.architecture()
        self.left = _DEFAULTS.get(model_type, {}) | self.left
        hidden_size = self.number("hidden_size", int)
        heads = self.number("num_attention_heads", int)
        kv_heads = self.number("num_key_value_heads", int, default=heads)
        if self.left.get("head_dim") is None and hidden_size % heads:
            raise self.refuse(
                f"hidden_size {hidden_size} is no multiple of {heads} num_attention_heads",
                "Give head_dim if heads do not divide the hidden size.",
            )
        head_dim = self.number("head_dim", int, default=hidden_size // heads)
        if heads % kv_heads:
            raise self.refuse(
                f"{heads} attention heads cannot share {kv_heads} key-value heads",
                "num_attention_heads must be a multiple of num_key_value_heads.",
            )
        if not 32 <= head_dim <= 256 or head_dim % 2:
            raise self.refuse(f"head_dim is {head_dim}", "Supported: even sizes from 32 to 256.")
        if (act := self.take("hidden_act", "silu")) not in ("silu", "swish"):
            raise self.refuse(f"hidden_act is {_SHORT.repr(act)}", "Supported: silu.")
        theta, scaling = self.rope()
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
            sliding_window=self.window(model_type),
            attention_bias=self.flag("attention_bias"),
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            bos_token_id=self.token_id("bos_token_id"),
            dtype=self.dtype(),
        )
        self.refuse_leftovers()
        return config

    def architecture(self) -> str:
        """The family, by model_type or else by the one class that is named."""
        model_type = self.take("model_type")
        architectures = self.take("architectures", [])
        known = f"Supported model types: {', '.join(_LLAMA_LIKE)}."
        if not isinstance(architectures, list):
            hint = "Expected: a list with the name of one class."
            raise self.refuse(f"architectures is {_SHORT.repr(architectures)}", hint)
        if model_type is None and not architectures:
            raise self.refuse("has neither model_type nor architectures", known)
        if model_type is None:
            named = (kind for kind, names in _LLAMA_LIKE.items() if architectures[0] in names)
            model_type = next(named, architectures[0])
        if model_type not in list(_LLAMA_LIKE):  # a list's test takes what cannot be hashed
            raise self.refuse(f"unknown architecture {_SHORT.repr(model_type)}", known)
        classes = _LLAMA_LIKE[model_type]
        if architectures and (len(architectures) > 1 or architectures[0] not in classes):
            raise self.refuse(
                f"architectures is {_SHORT.repr(architectures)}, not [{classes[0]!r}]",
                "Only causal language models can be scored.",
            )
        return model_type

    def window(self, model_type: str) -> int | None:
        """`sliding_window`, which only Mistral's attention heeds."""
        if self.left.get("sliding_window") is None:
            return self.take("sliding_window")
        if model_type == "llama":
            raise self.refuse(
                f"sliding_window is {_SHORT.repr(self.left['sliding_window'])}, but LLaMA has none",
                "transformers ignores it: remove the key, or name model_type mistral if the model "
                "was trained with a window.",
            )
        return self.number("sliding_window", int)

    def rope(self) -> tuple[float, RopeScaling | None]:
        """rope_theta and rope_scaling (transformers 4), or both in rope_parameters (5)."""
        old, new = self.take("rope_scaling"), self.take("rope_parameters")
        if old is not None and new is not None and old != new:
            raise self.refuse(
                "has both rope_scaling and rope_parameters, and they differ", "Remove one of them."
            )
        key = "rope_parameters" if new is not None else "rope_scaling"
        raw = old if new is None else new
        if not isinstance(raw if raw is not None else {}, dict):
            raise self.refuse(f"{key} is {_SHORT.repr(raw)}", "Expected: an object, or null.")
        inner = _Reader(self.path, raw or {}, f"{key}.")
        kind = inner.take("rope_type") or inner.left.get("type") or "default"
        if inner.take("type", kind) != kind:
            raise self.refuse(
                f"{key} has both type and rope_type, and they differ", "Remove one of them."
            )
        outside = self.left.get("rope_theta")
        theta = self.number("rope_theta", float, default=10000.0, least=0, above=0)
        inside = inner.number("rope_theta", float, default=theta, least=0, above=0)
        if outside is not None and inside != theta:
            raise self.refuse(
                f"rope_theta is {outside!r}, but {inside:g} inside {key}", "Remove one of them."
            )
        partial = inner.take("partial_rotary_factor", 1.0)
        if partial != 1.0:
            hint = "Only 1.0 is supported."
            raise self.refuse(f"{key}.partial_rotary_factor is {_SHORT.repr(partial)}", hint)
        scaling = self.scaling(key, kind, inner)
        for name, value in inner.left.items():
            if value is not None:
                raise self.refuse(
                    f"{key} has {name!r}, which is not known for rope_type {_SHORT.repr(kind)}",
                    "Remove it if it has no effect on the frequencies.",
                )
        return inside, scaling

    def scaling(self, key: str, kind: Any, inner: "_Reader") -> RopeScaling | None:
        if kind == "default":
            factor = inner.take("factor", 1)
            if factor != 1:  # transformers drops it without a word
                raise self.refuse(
                    f"{key} has factor {_SHORT.repr(factor)}, but no rope_type that uses it",
                    "Name the rope_type: linear, or llama3. Remove the factor if there is none.",
                )
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
                raise self.refuse(
                    f"{key} has high_freq_factor {scaling.high_freq_factor:g}, and "
                    f"low_freq_factor {scaling.low_freq_factor:g}",
                    "The high one must be above the low one.",
                )
            return scaling
        if kind == "dynamic":
            raise self.refuse(
                f"{key} is dynamic, which is not supported",
                "Its frequencies depend on the length of the row, so rows of different lengths "
                "could not share the keys of a common prefix.",
            )
        raise self.refuse(
            f"{key} has rope_type {_SHORT.repr(kind)}, which is not supported",
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
            raise self.refuse(f"dtype is {_SHORT.repr(name)}", f"Supported: {', '.join(DTYPES)}.")
        return name

    def refuse_leftovers(self) -> None:
        if (quantization := self.left.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise self.refuse(
                f"quantization_config ({method}) is not supported",
                "Give the checkpoint that it was quantised from.",
            )
        for key, value in self.left.items():
            if value is None or key in _WITHOUT_EFFECT or key.startswith("_"):
                continue
            if key.endswith("_dropout") and isinstance(value, (int, float)):
                continue
            if key in _ONLY:
                if value not in _ONLY[key]:
                    shown = _SHORT.repr(value)
                    raise self.refuse(f"{key} is {shown}, which is not supported", _IF_HARMLESS)
                continue
            raise self.refuse(
                f"{key} = {_SHORT.repr(value)} is not known, and may change the mathematics",
                _IF_HARMLESS,
            )
