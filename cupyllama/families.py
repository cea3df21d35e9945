"""The families of models: what the rest of the program asks about one, in one place.

config.json's model_type picks the family once; from there on a ModelConfig knows which it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from cupyllama import config_llama, config_opt
from cupyllama.checkpoint.llama import LLAMA_NAMES
from cupyllama.checkpoint.names import NameTable
from cupyllama.checkpoint.opt import OPT_NAMES
from cupyllama.config import ModelConfig
from cupyllama.config_reader import ConfigReader
from cupyllama.model import llama, opt

# A family's own classes, whose constructors and `forward` are alike: see `cupyllama.model`.
Stage = Any
StageWeights = Any


@dataclass(frozen=True)
class Family:
    """A file in model/, a name table, and how config.json is read."""

    classes: Mapping[str, tuple[str, ...]]  # each model_type, and what its architectures may be
    config: type[ModelConfig]
    read_config: Callable[[ConfigReader, str], ModelConfig]
    names: NameTable
    model: ModuleType  # Stage, StageWeights, LayerWeights


FAMILIES = {
    "llama": Family(
        config_llama.CLASSES,
        config_llama.LlamaConfig,
        config_llama.read_llama_config,
        LLAMA_NAMES,
        llama,
    ),
    "opt": Family(
        config_opt.CLASSES,
        config_opt.OptConfig,
        config_opt.read_opt_config,
        OPT_NAMES,
        opt,
    ),
}


def family_of(config: ModelConfig) -> Family:
    """The family that a model is of."""
    return FAMILIES[config.family]


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """What a results file has of a config."""
    return {"family": config.family, **asdict(config)}


def config_from_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """The config that `config_fields` wrote down; a rope_scaling stays a dictionary.

    Raises:
        KeyError, TypeError: the fields are not those of a family.
    """
    fields = dict(fields)
    family = fields.pop("family", "llama")  # absent before there was a second one
    return FAMILIES[family].config(**fields)
