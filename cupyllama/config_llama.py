"""LLaMA's config.json, and those of the models that share its equations."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cupyllama.config import ModelConfig, Share
from cupyllama.config_reader import ConfigReader, shown

# Each model_type, and its classes: the first conversions wrote LLaMA.
CLASSES = {
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

_WITHOUT_EFFECT = frozenset({"pretraining_tp", "is_llama_config"})
_ONLY = {
    "activation": ("silu", "swiglu"),  # hidden_act decides
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "use_sliding_window": (False,),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; the last three fields are llama3's."""

    rope_type: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """The numbers that define a LLaMA, under config.json's own names."""

    family: ClassVar[str] = "llama"

    intermediate_size: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    attention_bias: bool

    @property
    def max_length(self) -> int:
        window = self.sliding_window or self.max_position_embeddings
        return min(self.max_position_embeddings, window)

    @property
    def layer_parameters(self) -> int:
        attention = self.qkv_size * self.hidden_size + self.hidden_size * self.q_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def mlp_width(self) -> int:
        return 2 * self.intermediate_size  # gate and up

    def part(self, share: Share) -> "LlamaConfig":
        return replace(
            self,
            num_attention_heads=self.num_attention_heads // share.size,
            num_key_value_heads=max(1, self.num_key_value_heads // share.size),
            intermediate_size=self.intermediate_size // share.size,
            tie_word_embeddings=False,
            share=share,
        )

    def as_hugging_face(self) -> dict[str, Any]:
        scaling = self.rope_scaling
        rope: dict[str, Any] | None = None
        if scaling is not None:
            rope = {"rope_type": scaling.rope_type, "factor": scaling.factor}
            if scaling.rope_type == "llama3":
                for key in (
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                ):
                    rope[key] = getattr(scaling, key)
        same = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim rms_norm_eps rope_theta max_position_embeddings "
            "attention_bias tie_word_embeddings bos_token_id"
        )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            **{key: getattr(self, key) for key in same.split()},
            "rope_scaling": rope,
            "torch_dtype": self.dtype,
        }


def read_llama_config(reader: ConfigReader, model_type: str) -> LlamaConfig:
    """What config.json says, once its architecture is known.

    Raises:
        ModelError: as `load_config`.
    """
    reader.left = _DEFAULTS.get(model_type, {}) | reader.left
    hidden_size = reader.number("hidden_size", int)
    heads = reader.number("num_attention_heads", int)
    kv_heads = reader.number("num_key_value_heads", int, default=heads)
    if reader.left.get("head_dim") is None and hidden_size % heads:
        raise reader.refuse(
            f"hidden_size {hidden_size} is no multiple of {heads} num_attention_heads",
            "Give head_dim if heads do not divide the hidden size.",
        )
    head_dim = reader.number("head_dim", int, default=hidden_size // heads)
    if heads % kv_heads:
        raise reader.refuse(
            f"{heads} attention heads cannot share {kv_heads} key-value heads",
            "num_attention_heads must be a multiple of num_key_value_heads.",
        )
    reader.check_head_dim(head_dim)
    if (act := reader.take("hidden_act", "silu")) not in ("silu", "swish"):
        raise reader.refuse(f"hidden_act is {shown(act)}", "Supported: silu.")
    theta, scaling = _rope(reader)
    config = LlamaConfig(
        vocab_size=reader.number("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=reader.number("intermediate_size", int),
        num_hidden_layers=reader.number("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", float, default=1e-6, least=0),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=reader.number("max_position_embeddings", int, default=2048),
        sliding_window=_window(reader, model_type),
        attention_bias=reader.flag("attention_bias"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        bos_token_id=reader.token_id("bos_token_id"),
        dtype=reader.dtype(),
    )
    reader.refuse_leftovers(_WITHOUT_EFFECT, _ONLY)
    return config


def _window(reader: ConfigReader, model_type: str) -> int | None:
    """`sliding_window`, which only Mistral's attention heeds."""
    if reader.left.get("sliding_window") is None:
        return reader.take("sliding_window")
    if model_type == "llama":
        raise reader.refuse(
            f"sliding_window is {shown(reader.left['sliding_window'])}, but LLaMA has none",
            "transformers ignores it: remove the key, or name model_type mistral if the model "
            "was trained with a window.",
        )
    return reader.number("sliding_window", int)


def _rope(reader: ConfigReader) -> tuple[float, RopeScaling | None]:
    """rope_theta and rope_scaling (transformers 4), or both in rope_parameters (5)."""
    old, new = reader.take("rope_scaling"), reader.take("rope_parameters")
    if old is not None and new is not None and old != new:
        raise reader.refuse(
            "has both rope_scaling and rope_parameters, and they differ", "Remove one of them."
        )
    key = "rope_parameters" if new is not None else "rope_scaling"
    raw = old if new is None else new
    if not isinstance(raw if raw is not None else {}, dict):
        raise reader.refuse(f"{key} is {shown(raw)}", "Expected: an object, or null.")
    inner = ConfigReader(reader.path, raw or {}, f"{key}.")
    kind = inner.take("rope_type") or inner.left.get("type") or "default"
    if inner.take("type", kind) != kind:
        raise reader.refuse(
            f"{key} has both type and rope_type, and they differ", "Remove one of them."
        )
    outside = reader.left.get("rope_theta")
    theta = reader.number("rope_theta", float, default=10000.0, least=0, above=0)
    inside = inner.number("rope_theta", float, default=theta, least=0, above=0)
    if outside is not None and inside != theta:
        raise reader.refuse(
            f"rope_theta is {outside!r}, but {inside:g} inside {key}", "Remove one of them."
        )
    partial = inner.take("partial_rotary_factor", 1.0)
    if partial != 1.0:
        hint = "Only 1.0 is supported."
        raise reader.refuse(f"{key}.partial_rotary_factor is {shown(partial)}", hint)
    scaling = _scaling(key, kind, inner)
    for name, value in inner.left.items():
        if value is not None:
            raise reader.refuse(
                f"{key} has {name!r}, which is not known for rope_type {shown(kind)}",
                "Remove it if it has no effect on the frequencies.",
            )
    return inside, scaling


def _scaling(key: str, kind: Any, inner: ConfigReader) -> RopeScaling | None:
    if kind == "default":
        factor = inner.take("factor", 1)
        if factor != 1:  # transformers drops it without a word
            raise inner.refuse(
                f"{key} has factor {shown(factor)}, but no rope_type that uses it",
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
            raise inner.refuse(
                f"{key} has high_freq_factor {scaling.high_freq_factor:g}, and "
                f"low_freq_factor {scaling.low_freq_factor:g}",
                "The high one must be above the low one.",
            )
        return scaling
    if kind == "dynamic":
        raise inner.refuse(
            f"{key} is dynamic, which is not supported",
            "Its frequencies depend on the length of the row, so rows of different lengths "
            "could not share the keys of a common prefix.",
        )
    raise inner.refuse(
        f"{key} has rope_type {shown(kind)}, which is not supported",
        "Supported: default, linear, llama3.",
    )
