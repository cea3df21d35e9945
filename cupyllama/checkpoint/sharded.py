"""What `cupyllama shard` wrote, read back: the same tensors, from a file for each stage.

A stage file holds the arrays of a stage in the order in which loading wants them, q, k, v and gate,
up already stacked; with tensor parallelism there is one for each rank of a stage, which holds its
part of them. A part of a stacked array is still one run of bytes, so the checkpoint offers the
parts by Hugging Face's names, those of several ranks side by side: it can be loaded for any number
of stages and of ranks in each, and sharded again.
"""

import json
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from cupyllama.checkpoint.fields import (
    MATRIX_DTYPES,
    STORED_SCALE,
    Field,
    stage_fields,
    tensor_sizes,
)
from cupyllama.checkpoint.safetensors import read_header
from cupyllama.checkpoint.slices import BandScales, whole
from cupyllama.checkpoint.source import INCOMPLETE, Checkpoint, StoredTensor, Tensor
from cupyllama.config import Share, load_config
from cupyllama.errors import ModelError, UsageError
from cupyllama.tensor_parallel import check_tensor_parallel, part_of

MANIFEST = "manifest.json"
FORMAT = "cupyllama-shard"
VERSION = 1
QUANTIZATION = "quantization"
TENSOR_PARALLEL = "tensor_parallel"
# The keys of a stage file's metadata: the manifest's id, and the stage's number.
ID_KEY = "cupyllama_shard"
STAGE_KEY = "stage"


def array_name(layer: int | None, field: str) -> str:
    """What an array is called in a stage file."""
    return field if layer is None else f"layers.{layer}.{field}"


def stage_file(number: int, stages: int, ranks: int) -> str:
    """The name of a file: they are numbered by stage, and within it by rank."""
    stage, rank = divmod(number, ranks)
    part = f".tp-{rank}-of-{ranks}" if ranks > 1 else ""
    return f"stage-{stage:02d}-of-{stages:02d}{part}.safetensors"


def is_sharded(directory: Path) -> bool:
    """Whether the directory is one that `cupyllama shard` wrote."""
    if any(directory.glob("stage-*-of-*.safetensors")):
        return (directory / MANIFEST).is_file()  # broken or not: reading it will tell
    return False


def stored_quantization(directory: Path) -> str | None:
    """What the layers' matrices in a directory are, sharded or not: fp8, int8, or None.

    Raises:
        ModelError: the manifest is broken.
    """
    return _read_manifest(directory)[QUANTIZATION] if is_sharded(directory) else None


def open_sharded(directory: Path) -> Checkpoint:
    """The checkpoint that a manifest describes.

    Raises:
        ModelError: a stage file is missing, truncated, or of another model.
    """
    manifest = _read_manifest(directory)
    config, quantization = load_config(directory), manifest[QUANTIZATION]
    ranks = manifest[TENSOR_PARALLEL]
    found: list[dict[str, StoredTensor]] = [{} for _ in range(ranks)]
    for number, stage in enumerate(manifest["stages"]):
        path, rank = directory / stage["file"], number % ranks
        arrays = checked_stage(path, stage["bytes"], manifest["id"], number)
        own = part_of(config, Share(rank, ranks) if ranks > 1 else None)
        fields = stage_fields(own, range(*stage["layers"]), quantization)
        for tensor in _parts(path, arrays, fields):
            # A tied embedding is in the first stage and in the last.
            found[rank].setdefault(tensor.name, tensor)
    if ranks == 1:
        return Checkpoint(directory, "sharded", found[0], quantization)
    tensors: dict[str, Tensor] = {}
    for name, sizes in tensor_sizes(config, quantization).items():
        parts = [tensors_of_rank[name] for tensors_of_rank in found]
        tensors[name] = whole(parts, sizes, config)
        if name.endswith(STORED_SCALE) and tensors[name] is parts[0]:
            # Of whole rows, of which each rank has some columns and scales of its own.
            tensors[name] = BandScales(tuple(parts))
    bands = ranks if quantization is not None else 1
    return Checkpoint(directory, "sharded", tensors, quantization, bands)


def checked_stage(path: Path, nbytes: int, identity: str, stage: int) -> dict[str, StoredTensor]:
    """The arrays of a stage file that is whole and belongs to the manifest.

    Raises:
        ModelError: it is missing, of another size, or of another model or stage.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise ModelError(
            f"{path}: {error.strerror}, though {MANIFEST} names it", "Was it copied whole?"
        ) from error
    if found != nbytes:
        raise ModelError(
            f"{path}: has {found:,} bytes, but {MANIFEST} says {nbytes:,}", "Was it copied whole?"
        )
    arrays, metadata = read_header(path)
    if metadata.get(ID_KEY) != identity or metadata.get(STAGE_KEY) != str(stage):
        raise ModelError(
            f"{path}: belongs to another model than {MANIFEST}, or to another stage",
            "Were files of two sharded checkpoints mixed? Shard the model again.",
        )
    return arrays


def _parts(
    path: Path, arrays: dict[str, StoredTensor], fields: Iterable[tuple[int | None, Field]]
) -> Iterator[StoredTensor]:
    """The tensors, by Hugging Face's names, that the arrays of a stage are stacked of."""
    left = dict(arrays)
    for layer, field in fields:
        name = array_name(layer, field.name)
        stored = left.pop(name, None)
        if stored is None:
            raise ModelError(f"{path}: has no array {name}", "Shard the model again.")
        if stored.shape != field.shape:
            raise ModelError(
                f"{path}: {name} is {list(stored.shape)}, but config.json makes it "
                f"{list(field.shape)}",
                "Do config.json and the weights belong to the same model?",
            )
        offset, itemsize = stored.offset, stored.nbytes // prod(stored.shape)
        for part, shape in zip(field.parts, field.shapes, strict=True):
            nbytes = prod(shape) * itemsize
            yield StoredTensor(part, path, stored.dtype, shape, offset, nbytes)
            offset += nbytes
    for name in left:
        raise ModelError(f"{path}: {name} is not an array of this stage", "Shard the model again.")


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version, stages = manifest["version"], manifest["stages"]
        if version != VERSION:
            raise ModelError(
                f"{path}: is of version {version!r}; this cupyllama reads version {VERSION}",
                "Shard the model again.",
            )
        # Absent before there was a choice.
        if manifest.setdefault(QUANTIZATION, None) not in (None, *MATRIX_DTYPES):
            raise ModelError(
                f"{path}: is of {QUANTIZATION} {manifest[QUANTIZATION]!r}; this cupyllama reads "
                f"{', '.join(MATRIX_DTYPES)}",
                "Shard the original checkpoint again.",
            )
        ranks, config = manifest[TENSOR_PARALLEL], load_config(directory)
        if type(ranks) is not int or ranks < 1 or len(stages) % ranks:
            raise ValueError(f"{len(stages)} files cannot be those of {ranks!r:.20} ranks a stage")
        layers = 0
        for number, stage in enumerate(stages):
            first, last = stage["layers"]
            plain = Path(stage["file"]).name == stage["file"] and type(stage["bytes"]) is int
            follows = first == layers if number % ranks == 0 else last == layers
            if not follows or type(last) is not int or last <= first or not plain:
                raise ValueError(f"stage {stage!r:.100} cannot be")
            layers = last
        if not isinstance(manifest["id"], str):
            raise ValueError("id is no text")
        if layers != config.num_hidden_layers:
            raise ValueError(f"its stages have {layers} layers, and config.json says otherwise")
        check_tensor_parallel(config, ranks)
        return manifest
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except (
        UsageError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelError(f"{path}: not a manifest: {error!r}", INCOMPLETE) from error
