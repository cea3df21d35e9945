"""Tensors of a Hugging Face directory: one model.safetensors, or several and their index.

The safetensors library checks each file; the bytes are then read with `readinto` from where the
header says they lie, so that a tensor goes straight to the memory that wants it.
"""

import json
from pathlib import Path

import safetensors

from cupyllama.checkpoint.source import INCOMPLETE, Checkpoint, StoredTensor, Tensor, gather_index
from cupyllama.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def has_safetensors(directory: Path) -> bool:
    """Whether the directory has weights in this form."""
    return (directory / _INDEX).is_file() or (directory / _SINGLE).is_file()


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of one model directory, by name."""

    def __init__(self, directory: Path):
        super().__init__(directory, "safetensors", _directory_tensors(directory))


def _directory_tensors(directory: Path) -> dict[str, Tensor]:
    index, single = directory / _INDEX, directory / _SINGLE
    if index.is_file():
        return gather_index(index, "safetensors", lambda path: read_header(path)[0])
    if single.is_file():
        return dict(read_header(single)[0])
    raise ModelError(f"{directory}: has no {_SINGLE} and no {_INDEX}", INCOMPLETE)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Every tensor in one file, and the file's metadata.

    The format: 8 bytes of header length, a JSON header, the data.

    Raises:
        ModelError: the file cannot be read, or is not what it should be.
    """
    try:
        # safe_open calls a file missing that may not be read: `open` comes first.
        with open(path, "rb") as file:
            with safetensors.safe_open(path, framework="np"):
                pass  # opening checks the header against the file's size, and each range in it
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path}: truncated or corrupt: {error}", INCOMPLETE) from error
    except OSError as error:
        hint = "May this user read the file?"
        raise ModelError(f"{path}: {error.strerror or error}", hint) from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(
            name, path, entry["dtype"], shape, 8 + length + first, last - first
        )
    return tensors, metadata
