"""params.json, as Meta ships it beside its weights, to the numbers that config.json has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupyllama.config_llama import LlamaConfig, RopeScaling
from cupyllama.errors import ModelError

PARAMS = "params.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LLAMA_3_VOCABULARY = 128000  # BOS is the first token behind it; in LLaMA 1 and 2 it is token 1
# LLaMA 3.2's small models stretch frequencies by 32 and 3.1's by 8, but their params.json say
# the same: (dim, n_layers) of the small ones.
_LLAMA_3_2 = {(2048, 16), (3072, 28)}
_WITHOUT_EFFECT = {"max_batch_size", "max_seq_len", "model_parallel_size"}


@dataclass(frozen=True)
class MetaParams:
    """The fields of params.json, under its own names, with Meta's defaults."""

    path: Path
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int  # -1 until the weights tell
    multiple_of: int
    ffn_dim_multiplier: float | None
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool
    max_seq_len: int | None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def intermediate_size(self) -> int:
        """Two thirds of 4 dim, times the multiplier, rounded up to multiple_of."""
        inner = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            inner = int(self.ffn_dim_multiplier * inner)
        return -(-inner // self.multiple_of) * self.multiple_of

    def max_position_embeddings(self, dtype: str) -> int:
        """The length that the model was trained for, which params.json seldom says.

        max_seq_len if it does; 131072 for a scaled rope (LLaMA 3.1); 8192 from rope_theta 500000
        on (LLaMA 3), 16384 from 1000000 on (Code Llama); and of the two with rope_theta 10000,
        LLaMA 1 came in float16 (2048) and LLaMA 2 in bfloat16 (4096).
        """
        if self.max_seq_len is not None:
            return self.max_seq_len
        if self.use_scaled_rope:
            return 131072
        if self.rope_theta >= 1e6:
            return 16384
        if self.rope_theta >= 5e5:
            return 8192
        return 2048 if dtype == "float16" else 4096

    def config(self, vocabulary: int, stored_dtype: str) -> LlamaConfig:
        """The same model as config.json would describe it.

        Args:
            vocabulary: rows of the embedding.
            stored_dtype: of the embedding, as safetensors spells it.
        """
        if stored_dtype not in _DTYPES:
            raise ModelError(f"{self.path.parent}: the embedding is stored as {stored_dtype}")
        if self.vocab_size not in (-1, vocabulary):
            raise ModelError(
                f"{self.path}: vocab_size is {self.vocab_size}, but the embedding has "
                f"{vocabulary} rows",
                f"Do {PARAMS} and the weights belong to the same model?",
            )
        dtype = _DTYPES[stored_dtype]
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.dim,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            # the constants of Meta's apply_scaling
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
            if self.use_scaled_rope
            else None,
            max_position_embeddings=self.max_position_embeddings(dtype),
            sliding_window=None,
            attention_bias=False,
            tie_word_embeddings=False,
            bos_token_id=1 if vocabulary < _LLAMA_3_VOCABULARY else _LLAMA_3_VOCABULARY,
            dtype=dtype,
        )


def read_params(directory: Path) -> MetaParams:
    """Read params.json.

    Raises:
        ModelError: it is missing, broken, impossible, or has a key that is not known.
    """
    path = directory / PARAMS
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", "Is the download complete?") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}", "Is the download complete?") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: not a JSON object")
    known = set(MetaParams.__dataclass_fields__) - {"path"} | _WITHOUT_EFFECT
    for key, value in raw.items():
        if key not in known and value is not None and value is not False:
            raise ModelError(
                f"{path}: {key} = {value!r} is not known, and may change the mathematics",
                "Remove the key if it has no effect on the forward pass.",
            )
    return _checked(path, raw)


def _checked(path: Path, raw: dict[str, Any]) -> MetaParams:
    def number(key: str, kind: type, default: Any = None, least: float = 1) -> Any:
        value = raw.get(key, default)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{path}: {key} is missing", "Is the download complete?")
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not valid or not least <= value < 1e12 or value != kind(value):
            raise ModelError(f"{path}: {key} is {value!r}, which cannot be")
        return kind(value)

    heads = number("n_heads", int)
    multiplier = raw.get("ffn_dim_multiplier")
    longest = raw.get("max_seq_len")
    scaled = raw.get("use_scaled_rope") or False
    if not isinstance(scaled, bool):
        raise ModelError(f"{path}: use_scaled_rope is {scaled!r}, not true or false")
    params = MetaParams(
        path=path,
        dim=number("dim", int),
        n_layers=number("n_layers", int),
        n_heads=heads,
        n_kv_heads=number("n_kv_heads", int, default=heads),
        vocab_size=number("vocab_size", int, default=-1, least=-1),
        multiple_of=number("multiple_of", int, default=256),
        ffn_dim_multiplier=None
        if multiplier is None
        else number("ffn_dim_multiplier", float, least=0),
        norm_eps=number("norm_eps", float, default=1e-5, least=0),
        rope_theta=number("rope_theta", float, default=10000.0),
        use_scaled_rope=scaled,
        max_seq_len=None if longest is None else number("max_seq_len", int),
    )
    if params.dim % heads or heads % params.n_kv_heads:
        raise ModelError(
            f"{path}: dim {params.dim}, n_heads {heads} and n_kv_heads {params.n_kv_heads} do not "
            "divide each other"
        )
    if not 32 <= params.head_dim <= 256 or params.head_dim % 2:
        raise ModelError(
            f"{path}: makes heads of {params.head_dim}; even sizes from 32 to 256 are supported"
        )
    if scaled and (params.dim, params.n_layers) in _LLAMA_3_2:
        raise ModelError(
            f"{path}: is a LLaMA 3.2, whose rope factor {PARAMS} does not say",
            "Give the checkpoint in Hugging Face's form.",
        )
    return params
