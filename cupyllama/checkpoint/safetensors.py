"""Tensors of a Hugging Face directory: one model.safetensors, or several and their index.

The safetensors library checks each file; the bytes are then read with `readinto` from where the
header says they lie, so that a tensor goes straight to the memory that wants it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from cupyllama.errors import ModelError

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# rotary_emb.inv_freq and the like are never read, so their dtype need not be known.
_DIGEST_SAMPLE = 4096


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    name: str
    path: Path
    dtype: str  # as safetensors spells it: F32, F16, BF16, …
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


class SafetensorsCheckpoint:
    """The tensors of one model directory, by name."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.bytes_read = 0
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self.tensors = _indexed(index)
        elif (single := directory / "model.safetensors").is_file():
            self.tensors = {tensor.name: tensor for tensor in _stored_tensors(single)}
        else:
            raise ModelError(
                f"{directory}: has no model.safetensors and no model.safetensors.index.json",
                "Is the download complete?",
            )

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read the tensor into `out`, of the same number of elements, converted to its dtype.

        Raises:
            ModelError: a dtype that is not a float of 16 or 32 bits, or a file that ends early.
        """
        stored = self.tensors[name]
        dtype = _DTYPES.get(stored.dtype)
        if dtype is None:
            raise ModelError(
                f"{stored.path}: {name} is stored as {stored.dtype}",
                f"Supported: {', '.join(_DTYPES)}.",
            )
        direct = dtype == out.dtype and out.flags.c_contiguous
        values = out if direct else np.empty(out.shape, dtype)
        self._read_bytes(stored, values.reshape(-1).view(np.uint8))
        if not direct:
            with np.errstate(over="ignore"):  # beyond float16: scoring finds the infinity
                out[...] = values

    def _read_bytes(self, stored: StoredTensor, out: np.ndarray) -> None:
        try:
            with open(stored.path, "rb", buffering=0) as file:
                file.seek(stored.offset)
                view, done = memoryview(out), 0
                while done < stored.nbytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise ModelError(
                            f"{stored.path}: ends inside {stored.name}", "Is the download complete?"
                        )
                    done += count
        except OSError as error:
            raise ModelError(f"{stored.path}: {error.strerror}") from error
        self.bytes_read += stored.nbytes

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and first 4 KiB of every tensor.

        A sample: it tells models apart without reading all of their bytes.
        """
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            stored = self.tensors[name]
            sha.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
            with open(stored.path, "rb") as file:
                file.seek(stored.offset)
                sha.update(file.read(min(stored.nbytes, _DIGEST_SAMPLE)))
        return sha.hexdigest()


def _indexed(index: Path) -> dict[str, StoredTensor]:
    """The tensors that an index names, each looked up in the file it names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except OSError as error:
        raise ModelError(f"{index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors files: {error!r}") from error
    tensors = {}
    for file in files:
        path = index.parent / file
        if not path.is_file():
            raise ModelError(
                f"{path}: no such file, though {index.name} names it", "Is the download complete?"
            )
        for tensor in _stored_tensors(path):
            if tensor.name in tensors:
                raise ModelError(
                    f"{path}: has {tensor.name}, which {tensors[tensor.name].path.name} has too"
                )
            tensors[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise ModelError(
                f"{index.parent / file}: has no {name}, though {index.name} says so",
                "Is the download complete?",
            )
    return tensors


def _stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor in one file. The format: 8 bytes of header length, a JSON header, the data."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass  # opening checks the header against the file's size, and each range in it
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except safetensors.SafetensorError as error:
        raise ModelError(
            f"{path}: truncated or corrupt: {error}", "Is the download complete?"
        ) from error
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        shape = tuple(entry["shape"])
        yield StoredTensor(name, path, entry["dtype"], shape, 8 + length + first, last - first)
