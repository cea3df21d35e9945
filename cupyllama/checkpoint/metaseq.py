"""Tensors of Metaseq's own form, reshard-model_part-N.pt, under Hugging Face's names.

Each file is one part of the model, as model-parallel ranks held it and FSDP consolidated it, beside
the settings of the training run. A part has some heads and some of the inner size: rows of the
embedding, of fc1 and of qkv_proj, columns of fc2 and of out_proj, and all of the rest. qkv_proj has
a part's rows of k, then of v, then of q.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from cupyllama.checkpoint.joined import JoinedTensor, misfit
from cupyllama.checkpoint.metaseq_config import (
    check_config_beside,
    config_of,
    says_tied,
    steps,
    stored_parts,
)
from cupyllama.checkpoint.metaseq_parts import CONSOLIDATE, find_parts
from cupyllama.checkpoint.pytorch import StridedTensor, training_state
from cupyllama.checkpoint.source import INCOMPLETE, StoredTensor, Tensor, sample_of
from cupyllama.config_opt import OptConfig
from cupyllama.errors import ModelError

_EMBEDDING = "decoder.embed_tokens.weight"
_HEAD = "decoder.output_projection.weight"
_OUT_PROJ = "decoder.layers.0.self_attn.out_proj.weight"
_VERSION = "decoder.version"  # of the class that the weights are of
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STACKED = ("k_proj", "v_proj", "q_proj")  # in qkv_proj
_SAME_MODEL = "Do all parts belong to the same model?"


@dataclass(frozen=True)
class _Rule:
    """Where a weight and a bias of Metaseq's go, and how their parts are joined.

    An axis is None where every part has the same copy.
    """

    name: str
    weight: int | None = None
    bias: int | None = None


_BLOCK = "model.decoder.layers.{}."
_NAMES = {
    "decoder.embed_tokens": _Rule("model.decoder.embed_tokens", 0),
    "decoder.embed_positions": _Rule("model.decoder.embed_positions"),
    "decoder.project_in_dim": _Rule("model.decoder.project_in"),
    "decoder.layers.{}.self_attn_layer_norm": _Rule(_BLOCK + "self_attn_layer_norm"),
    "decoder.layers.{}.self_attn.q_proj": _Rule(_BLOCK + "self_attn.q_proj", 0, 0),
    "decoder.layers.{}.self_attn.k_proj": _Rule(_BLOCK + "self_attn.k_proj", 0, 0),
    "decoder.layers.{}.self_attn.v_proj": _Rule(_BLOCK + "self_attn.v_proj", 0, 0),
    "decoder.layers.{}.self_attn.out_proj": _Rule(_BLOCK + "self_attn.out_proj", 1),
    "decoder.layers.{}.final_layer_norm": _Rule(_BLOCK + "final_layer_norm"),
    "decoder.layers.{}.fc1": _Rule(_BLOCK + "fc1", 0, 0),
    "decoder.layers.{}.fc2": _Rule(_BLOCK + "fc2", 1),
    "decoder.layer_norm": _Rule("model.decoder.final_layer_norm"),
    "decoder.project_out_dim": _Rule("model.decoder.project_out"),
    "decoder.output_projection": _Rule("lm_head", 0),
}


@dataclass(frozen=True)
class _ModelPart:
    """What one file has."""

    path: Path
    tensors: dict[str, Tensor]  # by Metaseq's names, qkv_proj as its three
    state: dict[str, Any]  # all the rest


def load_metaseq_config(model: Path) -> OptConfig:
    """The config that the settings of the training run and the shapes of the weights make.

    Raises:
        ModelError: as `model_tensors`, or the number of heads is nowhere said.
    """
    parts = _read_parts(model)
    return config_of(parts[0].path, _joined(parts), parts[0].state)


def model_tensors(model: Path) -> Mapping[str, Tensor]:
    """The tensors of all parts, joined and named as Hugging Face names them.

    Raises:
        ModelError: a part is missing or broken, the parts do not fit each other, or the weights
            are still flattened as FSDP has them.
    """
    parts = _read_parts(model)
    first = parts[0]
    joined = _joined(parts)
    for name, tensor in first.tensors.items():
        if _placed(name, first.path)[1] is not None:
            continue
        expected = sample_of(tensor)
        for part in parts[1:]:
            if sample_of(part.tensors[name]) != expected:
                raise ModelError(
                    f"{part.path}: {name} is not what it is in {first.path.name}, "
                    "and every part has the same",
                    f"{_SAME_MODEL} Are they of the same step of its training?",
                )
    check_config_beside(first.path, first.state)
    return joined


def _read_parts(model: Path) -> list[_ModelPart]:
    """Every file, checked to be of one model, and all of it."""
    parts = []
    for path in find_parts(model):
        tensors, state = training_state(path)
        parts.append(_ModelPart(path, _unstacked(path, tensors), state))
    first = parts[0]
    for part in parts[1:]:
        for one, other in ((first, part), (part, first)):
            for name in one.tensors:
                if name not in other.tensors:
                    raise ModelError(
                        f"{other.path}: has no {name}, though {one.path.name} has it", _SAME_MODEL
                    )
        if steps(part.state) != steps(first.state):
            raise ModelError(
                f"{part.path}: was saved after {_counted(steps(part.state))}, and "
                f"{first.path.name} after {_counted(steps(first.state))}",
                "All parts must be of the same step of the training.",
            )
    _check_count(parts)
    return parts


def _counted(count: int | None) -> str:
    return "an unsaid number of updates" if count is None else f"{count:,} updates"


def _check_count(parts: list[_ModelPart]) -> None:
    """out_proj has as many rows in each part as it has columns in all of them."""
    first = parts[0]
    for name in (_EMBEDDING, _OUT_PROJ):
        if name not in first.tensors or len(first.tensors[name].shape) != 2:
            raise ModelError(
                f"{first.path}: has no matrix {name}", "Is it a Metaseq checkpoint of an OPT?"
            )
    rows, columns = first.tensors[_OUT_PROJ].shape
    if columns * len(parts) != rows:
        wanted = f"{rows / columns:g}" if columns else "no number of"
        said = stored_parts(first.state)
        raise ModelError(
            f"{first.path}: {_OUT_PROJ} is {rows} × {columns}, a part of {wanted}, but there "
            f"{'is 1 part' if len(parts) == 1 else f'are {len(parts)} parts'}"
            + ("" if said is None else f"; its cfg says model_parallel_size {said}"),
            "Give all parts, with a pattern or as a directory: "
            "--model 'DIR/reshard-model_part-*.pt'.",
        )


def _unstacked(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part, qkv_proj as its rows of k, v and q."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "flat_param" in name or "_fsdp_wrapped_module" in name:
            raise ModelError(f"{path}: {name} is flattened, as FSDP trains it", CONSOLIDATE)
        if ".qkv_proj." not in name:
            if name != _VERSION:
                found[name] = tensor
            continue
        if not prod(tensor.shape) or tensor.shape[0] % len(_STACKED):
            raise ModelError(f"{path}: {name} is {list(tensor.shape)}, not k, v and q", INCOMPLETE)
        rows = tensor.shape[0] // len(_STACKED)
        for number, stacked in enumerate(_STACKED):
            new = name.replace("qkv_proj", stacked)
            if new in tensors:
                raise ModelError(f"{path}: has both {name} and {new}", INCOMPLETE)
            found[new] = _rows(tensor, number * rows, rows)
    return found


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """Some rows of a tensor that lies in a file, as a tensor."""
    assert isinstance(tensor, StoredTensor | StridedTensor)
    row = apart = tensor.nbytes // tensor.shape[0]
    if isinstance(tensor, StridedTensor):
        apart = tensor.strides[0] * (tensor.nbytes // prod(tensor.shape))
    return replace(
        tensor,
        shape=(count, *tensor.shape[1:]),
        offset=tensor.offset + first * apart,
        nbytes=count * row,
    )


def _placed(name: str, path: Path) -> tuple[str, int | None]:
    """The new name of a tensor, and the axis along which parts were cut."""
    layer = _LAYER.match(name)
    stem, _, kind = _LAYER.sub("decoder.layers.{}.", name).rpartition(".")
    if stem not in _NAMES or kind not in ("weight", "bias"):
        raise ModelError(
            f"{path}: {name} is not a tensor of an OPT", "Is it a Metaseq checkpoint of an OPT?"
        )
    rule = _NAMES[stem]
    new = f"{rule.name}.{kind}".format(None if layer is None else int(layer[1]))
    return new, rule.weight if kind == "weight" else rule.bias


def _joined(parts: list[_ModelPart]) -> dict[str, Tensor]:
    """By Hugging Face's names, without a head that is tied to the embedding."""
    first = parts[0]
    skipped = _HEAD if _is_tied(first) else None
    tensors = {}
    for name in first.tensors:
        if name != skipped:
            new, axis = _placed(name, first.path)
            tensors[new] = _join(new, axis, tuple(part.tensors[name] for part in parts))
    return tensors


def _is_tied(part: _ModelPart) -> bool:
    """As its settings say, else as it is where the two are the same bytes of the file."""
    embedding, head = part.tensors[_EMBEDDING], part.tensors.get(_HEAD)
    said = says_tied(part.state)
    if said is not None:
        return said
    return head is None or replace(head, name=_EMBEDDING) == embedding


def _join(name: str, axis: int | None, parts: tuple[Tensor, ...]) -> Tensor:
    """One tensor of the parts: a plain one where a part is already all of it."""
    first = parts[0]
    for part in parts:
        shapes = (list(part.shape), list(first.shape))
        if axis is not None:
            for shape in shapes:
                del shape[axis : axis + 1]
        fits = shapes[0] == shapes[1] and len(part.shape) > (-1 if axis is None else axis)
        if not fits or part.dtype != first.dtype:
            raise misfit(first, part)
    if axis is None or len(parts) == 1:
        return replace(first, name=name)
    shape = list(first.shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return JoinedTensor(name, first.path, first.dtype, tuple(shape), parts, axis)
