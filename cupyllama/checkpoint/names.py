"""How a family says which tensors its models have, and which arrays they make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cupyllama.checkpoint.source import Tensor
from cupyllama.config import ModelConfig
from cupyllama.errors import ModelError


@dataclass(frozen=True)
class Part:
    """One stored tensor: the field it belongs to, and its shape in names of the ModelConfig.

    Parts of one field are stacked in the table's order: that is how q, k, v become one matrix.
    """

    field: str
    shape: tuple[str, ...]


Parts = dict[str, Part | None]


@dataclass(frozen=True)
class NameTable:
    """The tensors of a family by Hugging Face's names, and the fields of a stage they make.

    A name with {} is that of a tensor of every layer; the others are of the model's ends. Two
    fields have the same name in all families: embed_tokens, in the first stage, and lm_head, in
    the last one, which is embed_tokens where the two are tied.
    """

    parts: Callable[[ModelConfig], Parts]  # None: known, and computed instead of read
    matrices: tuple[str, ...]  # fields of a layer that --quantize is for
    first: tuple[str, ...]  # fields of the first stage, as far as a model has them
    last: tuple[str, ...]  # of the last stage, likewise
    # What names began with in older files, and what they begin with here.
    older_prefixes: Mapping[str, str] = field(default_factory=dict)


def newer_names(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The tensors, those with an older prefix under its newer one.

    Raises:
        ModelError: a tensor is there under both.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = next(filter(name.startswith, prefixes), "")
        newer = prefixes.get(old, "") + name.removeprefix(old)
        if newer in renamed:
            raise ModelError(f"{tensor.path}: {newer} is there under an older name too")
        renamed[newer] = tensor if newer == name else replace(tensor, name=newer)
    return renamed
