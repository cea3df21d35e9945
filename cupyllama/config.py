"""config.json to a ModelConfig; what is not known and could change the mathematics is refused."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cupyllama.config_reader import ConfigReader, shown
from cupyllama.errors import ModelError

if TYPE_CHECKING:
    from cupyllama.families import Family


@dataclass(frozen=True)
class Share:
    """Part `rank` of the `size` into which ranks share the matrices of a model."""

    rank: int
    size: int

    def vocabulary(self, vocab_size: int) -> range:
        """Its rows of lm_head, in eights: products of any other number of columns are slower."""
        first, last = (
            vocab_size if part == self.size else part * vocab_size // self.size // 8 * 8
            for part in (self.rank, self.rank + 1)
        )
        return range(first, last)


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that every model has, under config.json's own names; each family adds its own.

    Every family also has, as a field or as a property: num_key_value_heads, head_dim,
    intermediate_size (numbers that a token has between the matrices of the MLP), layer_parameters
    (weights of the matrices of one layer, fused as they are multiplied) and mlp_width
    (numbers of a token in the widest array that the MLP may write).
    """

    family: ClassVar[str]  # its name in `families.FAMILIES`

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    dtype: str  # as the checkpoint was saved
    # Given, heads and the MLP are those of one rank: see `part`.
    share: Share | None = field(default=None, kw_only=True)

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
    def head_rows(self) -> int:
        """Rows of lm_head."""
        if self.share is None:
            return self.vocab_size
        return len(self.share.vocabulary(self.vocab_size))

    @property
    def max_length(self) -> int:
        """The longest row whose attention this model sees whole, in tokens."""
        return self.max_position_embeddings

    @property
    def head_parameters(self) -> int:
        """Weights of the matrices behind the last layer."""
        return self.vocab_size * self.hidden_size

    def part(self, share: Share) -> "ModelConfig":
        """The model as one rank has it that shares every matrix, with sizes that can be shared.

        Of the heads and of the MLP it has its part, of hidden states and the vocabulary all. A tied
        embedding counts as one of its own and a head of its own: the rank has all rows of the one
        and some of the other.
        """
        raise NotImplementedError

    def as_hugging_face(self) -> dict[str, Any]:
        """The config.json, in the spelling of transformers 4, that reads back as this."""
        raise NotImplementedError


def load_config(model: Path) -> ModelConfig:
    """Read config.json in `model`, as transformers 4 or 5 wrote it, or else what Meta has instead:
    params.json, or the settings in the parts of a Metaseq checkpoint.

    Args:
        model: a directory, or a pattern for the names of the parts of a Metaseq checkpoint.

    Raises:
        ModelError: no such file, not JSON, an unknown architecture, a missing or impossible
            value, or a key whose meaning is not known.
    """
    from cupyllama.checkpoint.metaseq_parts import has_metaseq, model_directory

    path = model_directory(model) / "config.json"
    try:
        text = path.read_bytes()
    except NotADirectoryError as error:
        raise ModelError(
            f"{model}: is a file", f"--model takes the directory that it is in: {model.parent}"
        ) from error
    except FileNotFoundError as error:
        if has_metaseq(model):
            from cupyllama.checkpoint.metaseq import load_metaseq_config

            return load_metaseq_config(model)
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
    reader = ConfigReader(path, raw)
    family, model_type = _architecture(reader)
    return family.read_config(reader, model_type)


def _architecture(reader: ConfigReader) -> "tuple[Family, str]":
    """The family and the model_type in it, as model_type says, or else the one class named."""
    from cupyllama.families import FAMILIES  # which are made of configs

    types = {
        model_type: (family, classes)
        for family in FAMILIES.values()
        for model_type, classes in family.classes.items()
    }
    known = f"Supported model types: {', '.join(types)}."
    model_type = reader.take("model_type")
    architectures = reader.take("architectures", [])
    if not isinstance(architectures, list):
        hint = "Expected: a list with the name of one class."
        raise reader.refuse(f"architectures is {shown(architectures)}", hint)
    if model_type is None and not architectures:
        raise reader.refuse("has neither model_type nor architectures", known)
    if model_type is None:
        named = (kind for kind, (_, names) in types.items() if architectures[0] in names)
        model_type = next(named, architectures[0])
    if model_type not in list(types):  # a list's test takes what cannot be hashed
        raise reader.refuse(f"unknown architecture {shown(model_type)}", known)
    family, classes = types[model_type]
    if architectures and (len(architectures) > 1 or architectures[0] not in classes):
        raise reader.refuse(
            f"architectures is {shown(architectures)}, not [{classes[0]!r}]",
            "Only causal language models can be scored.",
        )
    return family, model_type
