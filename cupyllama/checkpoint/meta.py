"""Tensors of Meta's own form, consolidated.NN.pth and params.json, under Hugging Face's names.

Each file is one part of every matrix, as model-parallel ranks held them. Two things differ from
Hugging Face's form: the parts, joined here along the dimension that Meta split, and the order of
the rows of wq and wk. Meta rotates neighbouring pairs (2i, 2i + 1) of a head, Hugging Face's
rotate-half pairs (i, i + head_dim / 2); so row (t, i) of a head here is row (i, t) of Meta's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from cupyllama.checkpoint.joined import JoinedTensor, misfit
from cupyllama.checkpoint.meta_params import PARAMS, MetaParams, read_params
from cupyllama.checkpoint.pytorch import file_tensors
from cupyllama.checkpoint.source import INCOMPLETE, Tensor
from cupyllama.config_llama import LlamaConfig
from cupyllama.errors import ModelError

_PARTS = "consolidated.*.pth"
_QUERY = "layers.0.attention.wq.weight"  # (dim / parts, dim), in every model
_MOST_PARTS = 8


@dataclass(frozen=True)
class _Rule:
    """Where a tensor of Meta's goes: its new name and how its parts are joined."""

    name: str
    axis: int | None  # None: every part has the same copy
    rotary: bool = False


_EMBEDDING = "tok_embeddings.weight"
_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."
# None: known, and computed instead of read.
_NAMES: dict[str, _Rule | None] = {
    _EMBEDDING: _Rule("model.embed_tokens.weight", 1),  # LLaMA 3: axis 0, as the shapes say
    "layers.{}.attention_norm.weight": _Rule("model.layers.{}.input_layernorm.weight", None),
    "layers.{}.attention.wq.weight": _Rule(_ATTENTION + "q_proj.weight", 0, rotary=True),
    "layers.{}.attention.wk.weight": _Rule(_ATTENTION + "k_proj.weight", 0, rotary=True),
    "layers.{}.attention.wv.weight": _Rule(_ATTENTION + "v_proj.weight", 0),
    "layers.{}.attention.wo.weight": _Rule(_ATTENTION + "o_proj.weight", 1),
    "layers.{}.attention.inner_attention.rope.freqs": None,
    "layers.{}.ffn_norm.weight": _Rule("model.layers.{}.post_attention_layernorm.weight", None),
    "layers.{}.feed_forward.w1.weight": _Rule(_MLP + "gate_proj.weight", 0),
    "layers.{}.feed_forward.w3.weight": _Rule(_MLP + "up_proj.weight", 0),
    "layers.{}.feed_forward.w2.weight": _Rule(_MLP + "down_proj.weight", 1),
    "norm.weight": _Rule("model.norm.weight", None),
    "output.weight": _Rule("lm_head.weight", 0),
    "rope.freqs": None,
}
_LAYER = re.compile(r"^layers\.(\d+)\.")


def has_meta(directory: Path) -> bool:
    """Whether the directory has weights in this form; params.json may be missing."""
    return any(directory.glob(_PARTS))


def load_meta_config(directory: Path) -> LlamaConfig:
    """params.json as a config, with what only the weights can tell.

    Raises:
        ModelError: params.json or a part is missing, or it or the first is broken or not supported.
    """
    parts, params = _parts(directory), read_params(directory)
    tensors = file_tensors(parts[0])
    _check_count(parts, tensors, params)
    embedding = tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{parts[0]}: has no {_EMBEDDING}", INCOMPLETE)
    rows, columns = embedding.shape
    # Split along the vocabulary if each part has whole rows (LLaMA 3), else along the row.
    vocabulary = rows * len(parts) if columns == params.dim else rows
    return params.config(vocabulary, embedding.dtype)


def directory_tensors(directory: Path) -> Mapping[str, Tensor]:
    """The tensors of all parts, joined and named as Hugging Face names them.

    Raises:
        ModelError: a part is missing or broken, or the parts do not fit each other.
    """
    paths = _parts(directory)
    params = read_params(directory)
    parts = [file_tensors(path) for path in paths]
    _check_count(paths, parts[0], params)
    tensors: dict[str, Tensor] = {}
    for name in parts[0]:
        rule = _rule(name, paths[0])
        if rule is None:
            continue
        pieces = []
        for path, part in zip(paths, parts, strict=True):
            if name not in part:
                raise ModelError(
                    f"{path}: has no {name}, though {paths[0].name} has it", INCOMPLETE
                )
            pieces.append(part[name])
        tensors[rule.name] = _join(rule, tuple(pieces), params.dim, params.head_dim)
    for path, part in zip(paths, parts, strict=True):
        for name in part:
            if name not in parts[0]:
                raise ModelError(
                    f"{path}: has {name}, which {paths[0].name} does not have", INCOMPLETE
                )
    return tensors


def _parts(directory: Path) -> list[Path]:
    """consolidated.00.pth and on, none missing."""
    found = sorted(directory.glob(_PARTS))
    expected = [directory / f"consolidated.{number:02d}.pth" for number in range(len(found))]
    for path, wanted in zip(found, expected, strict=True):
        if path != wanted:
            raise ModelError(f"{wanted}: no such file, though there is {path.name}", INCOMPLETE)
    if not 1 <= len(found) <= _MOST_PARTS:
        raise ModelError(f"{directory}: has {len(found)} files {_PARTS}; 1 to 8 are supported")
    return found


def _check_count(paths: list[Path], first: Mapping[str, Tensor], params: MetaParams) -> None:
    """Refuse fewer parts than the first of them is one of.

    Raises:
        ModelError: saying how many there should be.
    """
    shape = first[_QUERY].shape if _QUERY in first else ()
    if len(shape) != 2 or shape[1] != params.dim or not 0 < len(paths) * shape[0] < params.dim:
        return
    found = ", ".join(path.name for path in paths)
    raise ModelError(
        f"{paths[0].parent}: has {len(paths)} of {params.dim // shape[0]} parts: {found}",
        f"{INCOMPLETE} {PARAMS} has dim {params.dim}, and {_QUERY} {shape[0]} rows a part.",
    )


def _rule(name: str, path: Path) -> _Rule | None:
    layer = _LAYER.match(name)
    template = _LAYER.sub("layers.{}.", name)
    if template not in _NAMES:
        raise ModelError(
            f"{path}: {name} is not a tensor of a LLaMA", "Is it a checkpoint of Meta's?"
        )
    rule = _NAMES[template]
    if rule is None or layer is None:
        return rule
    return _Rule(rule.name.format(int(layer[1])), rule.axis, rule.rotary)


def _join(rule: _Rule, parts: tuple[Tensor, ...], dim: int, head_dim: int) -> Tensor:
    """One tensor of the parts: a plain one where a part is already all of it."""
    first = parts[0]
    shape = first.shape
    if rule.axis is None or (len(parts) == 1 and not rule.rotary):
        for part in parts:
            if part.shape != shape or part.dtype != first.dtype:
                raise misfit(first, part)
        return replace(first, name=rule.name)
    if len(shape) != 2:
        raise ModelError(f"{first.path}: {first.name} is {list(shape)}, not a matrix")
    axis = 0 if first.name == _EMBEDDING and shape[1] == dim else rule.axis
    for part in parts:
        same = len(part.shape) == 2 and part.shape[1 - axis] == shape[1 - axis]
        if not same or part.dtype != first.dtype:
            raise misfit(first, part)
    joined = list(shape)
    joined[axis] = sum(part.shape[axis] for part in parts)
    head_dim = head_dim if rule.rotary else 1
    if joined[0] % head_dim or not prod(joined):
        raise ModelError(
            f"{first.path}: {first.name} is {list(shape)}, which is no number of heads of "
            f"{head_dim} rows",
            f"Do {PARAMS} and the weights belong to the same model?",
        )
    return JoinedTensor(rule.name, first.path, first.dtype, tuple(joined), parts, axis, head_dim)
