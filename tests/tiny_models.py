"""Tiny random checkpoints, made from a seed whenever a test wants one.

The repository holds no weights.  A checkpoint is a function of its name: the tensors are drawn in
the order of their sorted names from a PCG64 generator seeded with the CRC-32 of the model's name,
so a test can rebuild the very model over which the numbers in ``tests/data`` were recorded.
``weights_crc32`` tells a change of the weights from a mistake of the engine that reads them.

Each model stands for one way in which real checkpoints differ (grouped heads, a scaled rope, tied
embeddings, ...), and its ``config.json`` is spelled as the Transformers version of its day did.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny_opt import OPT_MODELS, opt_shapes, opt_std
from tiny_spread import LOGIT_STD, RESIDUAL_STD, SCORE_STD

DTYPES = ("float32", "float16", "bfloat16")


def _config(**changes: Any) -> dict[str, Any]:
    """A LLaMA ``config.json`` as Transformers 4 wrote it, with `changes` (None keys included)."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0",
        "use_cache": True,
        "vocab_size": 320,
    }
    config.update(changes)
    return config


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """`config` less `keys`, for keys that did not exist yet (or any more) when it was written."""
    return {key: value for key, value in config.items() if key not in keys}


TINY_MODELS: dict[str, dict[str, Any]] = {
    # The first LLaMA conversions: as many key heads as heads, and no keys for what came later.
    "llama1": _without(
        _config(
            num_hidden_layers=3,
            pad_token_id=0,
            rms_norm_eps=1e-6,
            transformers_version="4.28.0.dev0",
        ),
        "attention_bias",
        "attention_dropout",
        "num_key_value_heads",
        "pretraining_tp",
        "rope_theta",
    ),
    # Four heads a key head, and heads wider than hidden_size / num_attention_heads.
    "gqa": _config(head_dim=64, num_attention_heads=8, num_key_value_heads=2, rope_theta=500000.0),
    # LLaMA 3.1's rope; the original length is short enough to bend most frequencies.
    "llama3_rope": _config(
        eos_token_id=[2, 3],
        hidden_size=256,
        num_hidden_layers=3,
        rope_scaling={
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        vocab_size=384,
    ),
    # The spelling of rope_scaling before "type" became "rope_type".
    "linear_rope": _config(
        num_key_value_heads=4,
        rope_scaling={"type": "linear", "factor": 4.0},
        transformers_version="4.31.0",
    ),
    # The embedding is the output matrix too; there is no lm_head tensor.
    "tied": _config(hidden_size=64, head_dim=32, num_attention_heads=2, tie_word_embeddings=True),
    # Biases on the q, k, v and o projections.
    "attention_bias": _config(attention_bias=True, num_hidden_layers=3),
    # No size is a power of two or a multiple of a vector's width.
    "odd": _config(
        hidden_size=96,
        intermediate_size=137,
        num_attention_heads=3,
        num_hidden_layers=3,
        num_key_value_heads=1,
        vocab_size=331,
    ),
    # config.json as Transformers 5 writes it: rope_parameters and dtype.
    "transformers5": _without(
        _config(
            dtype="float32",
            head_dim=32,
            mlp_bias=False,
            pad_token_id=None,
            rope_parameters={"rope_theta": 250000.0, "rope_type": "default"},
            transformers_version="5.17.0",
        ),
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
    ),
    # Mistral is LLaMA with a sliding window, which rows no longer than the window do not meet.
    "mistral": _without(
        _config(
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            sliding_window=64,
            transformers_version="4.34.0",
        ),
        "attention_bias",
        "pretraining_tp",
        "rope_scaling",
    ),
    # Heads wider than many attention kernels take.
    "wide_heads": _config(
        head_dim=256, num_attention_heads=2, num_hidden_layers=4, num_key_value_heads=1
    ),
    # A vocabulary that fits the LLaMA tokenizer, for scoring of real text.
    "llama_tokenizer": _config(
        head_dim=32,
        hidden_size=64,
        intermediate_size=128,
        max_position_embeddings=256,
        vocab_size=32000,
    ),
    **OPT_MODELS,
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint with this `config`, by Hugging Face's names."""
    if config["model_type"] == "opt":
        return opt_shapes(config)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    key_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        projections = {
            "q": (heads * head_dim, hidden),
            "k": (key_heads * head_dim, hidden),
            "v": (key_heads * head_dim, hidden),
            "o": (hidden, heads * head_dim),
        }
        for letter, shape in projections.items():
            shapes[f"{prefix}self_attn.{letter}_proj.weight"] = shape
            if config.get("attention_bias"):
                shapes[f"{prefix}self_attn.{letter}_proj.bias"] = shape[:1]
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    return shapes


def _std(tensor: str, shape: tuple[int, ...], config: dict[str, Any]) -> float:
    """The standard deviation to draw `tensor` with (norm weights are drawn around 1).

    Inputs of q, k, v, gate, up and lm_head have been normalised to a mean square of 1, so a
    matrix of standard deviation s / sqrt(columns) gives outputs of standard deviation s.
    """
    if config["model_type"] == "opt":
        return opt_std(tensor, shape, config)
    logit_std = LOGIT_STD / math.sqrt(config["hidden_size"])
    # A tied embedding has to give the logits their spread; the blocks then add as much.
    residual_std = logit_std if config["tie_word_embeddings"] else RESIDUAL_STD
    part = tensor.rsplit(".", 2)[-2]
    if part.endswith("norm") or part.endswith("layernorm"):
        return 0.1
    if tensor.endswith(".bias"):
        return residual_std if part == "o_proj" else 0.5
    if part == "embed_tokens":
        return residual_std
    if part == "lm_head":
        return logit_std
    output_std = {
        # A score is the dot product of q and k over sqrt(head_dim).
        "q_proj": math.sqrt(SCORE_STD),
        "k_proj": math.sqrt(SCORE_STD),
        "v_proj": 1.0,
        "o_proj": residual_std,
        "gate_proj": 1.5,
        "up_proj": 1.5,
        "down_proj": residual_std,
    }[part]
    return output_std / math.sqrt(shape[1])


def tiny_tensors(name: str) -> dict[str, np.ndarray]:
    """The float32 tensors of the tiny model `name`, in the order of their sorted names."""
    config = TINY_MODELS[name]
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    tensors = {}
    for tensor, shape in sorted(tensor_shapes(config).items()):
        values = generator.standard_normal(shape) * _std(tensor, shape, config)
        if tensor.endswith("norm.weight"):
            values += 1.0
        tensors[tensor] = values.astype(np.float32)
    return tensors


def weights_crc32(name: str) -> int:
    """A check sum of the float32 weights of `name`, little-endian, in the order of drawing."""
    crc = 0
    for values in tiny_tensors(name).values():
        crc = zlib.crc32(values.astype("<f4").tobytes(), crc)
    return crc


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 `values`, rounded to nearest even, as uint16 (NumPy has no
    bfloat16)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _save_bfloat16(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file of bfloat16 tensors, which safetensors.numpy cannot.

    The format is a little-endian uint64 length, a JSON header of that length, and the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for tensor, values in tensors.items():
        data = bfloat16_bits(values).astype("<u2").tobytes()
        begin, end = end, end + len(data)
        shape = list(values.shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        parts.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def _save(tensors: dict[str, np.ndarray], path: Path, dtype: str) -> int:
    """Write `tensors` as `dtype` to the safetensors file `path`; return their size in bytes."""
    if dtype == "bfloat16":
        _save_bfloat16(tensors, path)
        return sum(2 * values.size for values in tensors.values())
    cast = {tensor: values.astype(dtype) for tensor, values in tensors.items()}
    save_file(cast, path, metadata={"format": "pt"})
    return sum(values.nbytes for values in cast.values())


def write_tiny_model(
    name: str, directory: str | Path, *, dtype: str = "float32", shards: int = 1
) -> Path:
    """Write the tiny model `name` as a Hugging Face checkpoint and return its directory.

    With one shard that is ``config.json`` and ``model.safetensors``; with more, the files
    ``model-0000i-of-0000n.safetensors`` and ``model.safetensors.index.json``.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    tensors = tiny_tensors(name)
    if not 1 <= shards <= len(tensors):
        raise ValueError(f"{shards} shards of {len(tensors)} tensors")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    config = dict(TINY_MODELS[name])
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    if shards == 1:
        _save(tensors, directory / "model.safetensors", dtype)
        return directory
    weight_map, total_size = {}, 0
    for shard, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        part = {str(tensor): tensors[str(tensor)] for tensor in names}
        total_size += _save(part, directory / file, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return directory
