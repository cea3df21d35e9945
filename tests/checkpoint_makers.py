"""Checkpoints in PyTorch's and Meta's forms, written without torch.

`write_torch` writes what torch.save writes (a zip of stored entries with a pickle of protocol 2),
and lets a test lie in every part of it.
"""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tiny_models import TINY_MODELS, tiny_tensors

from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.config import load_config
from cupyllama.families import Stage, family_of
from cupyllama.loading import load_stage
from cupyllama.ops import reference

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
}


@dataclass
class Global:
    """A name that the pickle imports."""

    module: str
    name: str


@dataclass
class Call:
    """What the pickle has called while it is loaded."""

    function: Global
    arguments: tuple
    state: Any = None  # set on what the call returned


@dataclass
class Persistent:
    """A persistent id."""

    identity: Any


@dataclass
class Pickled:
    """What Python wrote as a pickle of protocol 2."""

    data: bytes


@dataclass
class View:
    """A tensor as a view of a storage; offset and strides in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = Global("collections", "OrderedDict")


def dumps(value: Any) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(k) + _opcodes(v) for k, v in value.items()) + b"u"
    if isinstance(value, Global):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Persistent):
        return _opcodes(value.identity) + b"Q"
    if isinstance(value, Call):
        called = _opcodes(value.function) + _opcodes(value.arguments) + b"R"
        return called if value.state is None else called + _opcodes(value.state) + b"b"
    if isinstance(value, Pickled):  # without its head and its end; nothing else here has a memo
        return value.data[2:-1]
    raise TypeError(type(value))


def rebuild(key: str, kind: str, elements: int, offset: int, shape: tuple, strides: tuple) -> Call:
    """What torch.save has for a tensor."""
    storage = Persistent(("storage", Global("torch", kind), key, "cpu", elements))
    hooks = Call(ORDERED_DICT, ())
    return Call(REBUILD, (storage, offset, shape, strides, False, hooks))


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=int)) for axis in range(len(shape)))


def write_torch(path: Path, tensors: dict[str, np.ndarray | View]) -> None:
    """Write the tensors as torch.save does; views of one array share its storage."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    content = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = View(tensor, 0, tensor.shape, contiguous(tensor.shape))
        key, storage = storages.setdefault(id(tensor.storage), (str(len(storages)), tensor.storage))
        kind = STORAGES[storage.dtype]
        content[name] = rebuild(
            key, kind, storage.size, tensor.offset, tensor.shape, tensor.strides
        )
    write_archive(path, dumps(content), {key: data.tobytes() for key, data in storages.values()})


def write_archive(
    path: Path,
    pickle: bytes,
    storages: dict[str, bytes],
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
    folder: str = "archive",
) -> None:
    """The zip file itself."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickle)
        archive.writestr(f"{folder}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{folder}/data/{key}", data)
        archive.writestr(f"{folder}/version", b"3\n")


def write_pytorch_model(name: str, directory: Path, dtype=np.float32, shards: int = 1) -> Path:
    """The tiny model `name` as pytorch_model.bin, or several and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = TINY_MODELS[name] | {"torch_dtype": str(np.dtype(dtype))}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {key: value.astype(dtype) for key, value in tiny_tensors(name).items()}
    if shards == 1:
        write_torch(directory / "pytorch_model.bin", tensors)
        return directory
    weight_map = {}
    for shard, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"pytorch_model-{shard:05d}-of-{shards:05d}.bin"
        write_torch(directory / file, {str(key): tensors[str(key)] for key in names})
        weight_map.update({str(key): file for key in names})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


def interleave(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of wq or wk from Hugging Face's order, row (t, i) of a head, to Meta's, (i, t)."""
    halves = matrix.reshape(-1, 2, head_dim // 2, matrix.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(matrix.shape)


def meta_tensors(
    tensors: dict[str, np.ndarray], head_dim: int, part: int, parts: int, embedding_axis: int
) -> dict[str, np.ndarray]:
    """What consolidated.0{part}.pth has of a Hugging Face checkpoint's tensors."""
    names = {
        "q_proj": ("attention.wq", 0),
        "k_proj": ("attention.wk", 0),
        "v_proj": ("attention.wv", 0),
        "o_proj": ("attention.wo", 1),
        "gate_proj": ("feed_forward.w1", 0),
        "down_proj": ("feed_forward.w2", 1),
        "up_proj": ("feed_forward.w3", 0),
        "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "embed_tokens": ("tok_embeddings", embedding_axis),
        "norm": ("norm", None),
        "lm_head": ("output", 0),
    }
    found = {}
    for name, values in tensors.items():
        words = name.split(".")
        new, axis = names[words[-2]]
        if words[-2] in ("q_proj", "k_proj"):
            values = interleave(values, head_dim)
        if axis is not None:
            values = np.array_split(values, parts, axis)[part]
        prefix = f"layers.{words[2]}." if words[1] == "layers" else ""
        found[f"{prefix}{new}.weight"] = np.ascontiguousarray(values)
    found["rope.freqs"] = np.ones(head_dim // 2, values.dtype)
    return found


def write_meta_model(
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    directory: Path,
    parts: int = 1,
    embedding_axis: int = 1,
    **params: Any,
) -> Path:
    """A checkpoint in Meta's form; `params` are added to params.json."""
    directory.mkdir(parents=True, exist_ok=True)
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    content = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads", heads),
        "vocab_size": -1,
        "multiple_of": 32,
        "norm_eps": config["rms_norm_eps"],
    }
    (directory / "params.json").write_text(json.dumps(content | params))
    for part in range(parts):
        piece = meta_tensors(tensors, head_dim, part, parts, embedding_axis)
        write_torch(directory / f"consolidated.{part:02d}.pth", piece)
    return directory


def open_stage(directory: Path, dtype=np.float32) -> Stage:
    """All layers of a checkpoint in whatever form, on the reference operations."""
    config, checkpoint = load_config(directory), open_checkpoint(directory)
    layers = range(config.num_hidden_layers)
    weights = load_stage(checkpoint, config, layers, np.dtype(dtype), reference)
    positions = min(512, config.max_position_embeddings)
    return family_of(config).model.Stage(config, weights, reference, positions)
