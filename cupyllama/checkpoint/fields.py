"""The arrays of a stage, and the stored tensors that they are stacked of."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from cupyllama.checkpoint.names import Part, Parts
from cupyllama.checkpoint.source import DTYPES, QUANTIZED, Checkpoint, Tensor
from cupyllama.config import ModelConfig
from cupyllama.errors import ModelError
from cupyllama.families import family_of

# The stored dtypes of what --quantize makes, and what follows the names of a matrix for its scales:
# in a stage, and in a checkpoint.
MATRIX_DTYPES = {"fp8": "F8_E4M3", "int8": "I8"}
KINDS = {dtype: kind for kind, dtype in MATRIX_DTYPES.items()}
SCALE_DTYPE = "F32"
SCALE = ".scale"
STORED_SCALE = "_scale"


@dataclass(frozen=True)
class Field:
    """One array of the stage: the stored tensors it stacks, and its shape."""

    name: str
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str | None = None  # as safetensors spells it, where it is not that of the stage

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def array_dtype(self, dtype: np.dtype) -> np.dtype:
        """The dtype of the array in a stage of `dtype`."""
        return dtype if self.dtype is None else (DTYPES | QUANTIZED)[self.dtype]

    def nbytes(self, dtype: np.dtype) -> int:
        """Memory of the array in a stage of `dtype`."""
        return prod(self.shape) * self.array_dtype(dtype).itemsize


def check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor that the model has is stored with the right shape, and nothing else is.

    Raises:
        ModelError: naming the file and the first missing, misshapen or unknown tensor.
    """
    table = _table(config, checkpoint.quantization)
    expected: dict[str, tuple[int, ...] | None] = {}
    dtypes: dict[str, str] = {}
    for template, part in table.items():
        for name in _names(template, config):
            expected[name] = None if part is None else _shape(part, config)
            if (
                part is not None
                and (dtype := _dtype(part.field, config, checkpoint.quantization)) is not None
            ):
                dtypes[name] = dtype
    if config.tie_word_embeddings:
        expected["lm_head.weight"] = None  # some writers store the tied matrix twice
    for name, shape in expected.items():
        stored = checkpoint.tensors.get(name)
        if shape is None:
            continue
        if stored is None:
            raise ModelError(
                f"{checkpoint.directory}: has no tensor {name}", "Is the download complete?"
            )
        if stored.shape != shape:
            raise ModelError(
                f"{stored.path}: {name} is {list(stored.shape)}, but config.json makes it "
                f"{list(shape)}",
                "Do config.json and the weights belong to the same model?",
            )
        if stored.dtype != dtypes.get(name, stored.dtype):
            raise ModelError(
                f"{stored.path}: {name} is stored as {stored.dtype}, not {dtypes[name]}",
                "Shard the original checkpoint again.",
            )
    for name, stored in checkpoint.tensors.items():
        if name not in expected:
            raise ModelError(
                f"{stored.path}: {name} is not a tensor of this model",
                "Do config.json and the weights belong to the same model?",
            )


def stage_fields(
    config: ModelConfig, layers: range, quantize: str | None = None
) -> Iterator[tuple[int | None, Field]]:
    """The arrays of a stage of `layers`, each with its layer, or None at the model's ends.

    Args:
        quantize: "fp8" or "int8" where matrices are so; then each one's scale is another array.
    """
    names, ends = family_of(config).names, _fields(config, None, quantize)
    if layers.start == 0:
        yield from ((None, ends[name]) for name in names.first if name in ends)
    for layer in layers:
        for field in _fields(config, layer, quantize).values():
            yield layer, field
    if layers.stop == config.num_hidden_layers:
        yield from ((None, ends[name]) for name in names.last if name in ends)
        if config.tie_word_embeddings and layers.start > 0:
            yield None, ends["embed_tokens"]


def stage_bytes(
    config: ModelConfig, layers: range, dtype: np.dtype, quantize: str | None = None
) -> int:
    """Memory of the weights of a stage."""
    fields = stage_fields(config, layers, quantize)
    return sum(field.nbytes(np.dtype(dtype)) for _, field in fields)


def stored_part(checkpoint: Checkpoint, name: str) -> Tensor:
    """A part of a field; of a scale that is not stored, the matrix whose it is."""
    if name not in checkpoint.tensors and name.endswith(STORED_SCALE):
        name = name.removesuffix(STORED_SCALE)
    return checkpoint.tensors[name]


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the matrices of any layer."""
    fields = _fields(config, 0, None)
    return {name: fields[name].shape for name in family_of(config).names.matrices}


def tensor_sizes(config: ModelConfig, quantize: str | None) -> dict[str, tuple[str, ...]]:
    """The stored tensors that are read, each with its shape in names of the config."""
    return {
        name: part.shape
        for template, part in _table(config, quantize).items()
        if part is not None
        for name in _names(template, config)
    }


def embedding_name(config: ModelConfig) -> str:
    """The stored tensor that is the embedding."""
    table = family_of(config).names.parts(config)
    return next(name for name, part in table.items() if part and part.field == "embed_tokens")


def _table(config: ModelConfig, quantize: str | None) -> Parts:
    names = family_of(config).names
    table = names.parts(config)
    if quantize is not None:
        for template, part in list(table.items()):
            if part is not None and part.field in names.matrices:
                table[template + STORED_SCALE] = Part(part.field + SCALE, part.shape[:1])
    return table


def _dtype(field: str, config: ModelConfig, quantize: str | None) -> str | None:
    """What a field is always stored as, if anything."""
    if quantize is None or field.removesuffix(SCALE) not in family_of(config).names.matrices:
        return None
    return SCALE_DTYPE if field.endswith(SCALE) else MATRIX_DTYPES[quantize]


def _shape(part: Part, config: ModelConfig) -> tuple[int, ...]:
    return tuple(getattr(config, size) for size in part.shape)


def _names(template: str, config: ModelConfig) -> list[str]:
    if "{}" not in template:
        return [template]
    return [template.format(layer) for layer in range(config.num_hidden_layers)]


def _fields(config: ModelConfig, layer: int | None, quantize: str | None) -> dict[str, Field]:
    """The table's fields of one layer (or of the model's ends), their parts gathered."""
    gathered: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for template, part in _table(config, quantize).items():
        if part is not None and ("{}" in template) == (layer is not None):
            entry = (template.format(layer), _shape(part, config))
            gathered.setdefault(part.field, []).append(entry)
    return {
        field: Field(
            field,
            *(tuple(column) for column in zip(*entries, strict=True)),
            _dtype(field, config, quantize),
        )
        for field, entries in gathered.items()
    }
