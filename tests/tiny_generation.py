"""Tiny models whose greedy text runs into no loop at once, as that of random ones often does.

Each is one of the tiny models with some of its tensors scaled. OPT's hidden states are mostly its
biases and what ReLU adds to every token alike, and say little of the tokens, unless those are kept
small. With its embedding as head it would say the same token for ever.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny_models
from safetensors.numpy import load_file, save_file

# The model that each is made of, the keys of config.json that differ, and by what tensors with a
# part of a name in it are multiplied.
GENERATING: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "gqa": ("gqa", {"num_hidden_layers": 4}, {}),
    "llama3_rope": ("llama3_rope", {}, {}),
    "opt_varied": (
        "opt",
        {"tie_word_embeddings": False, "num_hidden_layers": 4},
        {"bias": 0.1, "fc2.weight": 0.3, "q_proj": 3.0},
    ),
    "opt_350m_varied": (
        "opt_350m",
        {"tie_word_embeddings": False},
        {
            "bias": 0.1,
            "embed": 2.0,
            "q_proj": 3.0,
            "fc2.weight": 0.3,
            "project_in": 0.5,
            "lm_head": 8.0,
        },
    ),
}


def generating_config(name: str) -> dict[str, Any]:
    """The config.json of one."""
    base, changes, _ = GENERATING[name]
    return tiny_models.TINY_MODELS[base] | changes


def generating_tensors(name: str) -> dict[str, np.ndarray]:
    """The float32 tensors of one."""
    with mock.patch.dict(tiny_models.TINY_MODELS, {name: generating_config(name)}):
        tensors = tiny_models.tiny_tensors(name)
    for part, scale in GENERATING[name][2].items():
        for tensor in tensors:
            if part in tensor:
                tensors[tensor] = tensors[tensor] * np.float32(scale)
    return tensors


def generating_crc32(name: str) -> int:
    """A check sum of the tensors, as `tiny_models.weights_crc32` makes it."""
    crc = 0
    for values in generating_tensors(name).values():
        crc = zlib.crc32(values.astype("<f4").tobytes(), crc)
    return crc


def write_generating_model(name: str, directory: str | Path) -> Path:
    """Write one as a Hugging Face checkpoint, and return its directory."""
    with mock.patch.dict(tiny_models.TINY_MODELS, {name: generating_config(name)}):
        path = tiny_models.write_tiny_model(name, directory)
    save_file(generating_tensors(name), path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_overflowing_model(directory: str | Path) -> Path:
    """Write one whose feed-forward products float16 has no room for, and other dtypes have."""
    path = tiny_models.write_tiny_model("gqa", directory) / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        for part, scale in (("gate_proj", 1000), ("up_proj", 1000), ("down_proj", 1e-6)):
            if part in name:
                tensors[name] = tensors[name] * np.float32(scale)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.parent
