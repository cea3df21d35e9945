"""What every form of checkpoint offers its readers: tensors by Hugging Face's names, as bytes.

A form of checkpoint is a function from a directory to its tensors; a tensor knows how to give its
rows. Everything else (counting, conversion, the digest) is here, once.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from cupyllama.errors import ModelError

# As safetensors spells them. rotary_emb.inv_freq and the like are never read, so their dtype need
# not be known.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Numbers that mean nothing without a scale, so they are only ever bits; as safetensors spells them.
QUANTIZED = {"F8_E4M3": np.dtype(np.uint8), "I8": np.dtype(np.int8)}
_DIGEST_SAMPLE = 4096
_CONVERTED_BYTES = 32 << 20  # read at a time where bytes cannot go straight to their place
INCOMPLETE = "Is the download complete?"

Read = Callable[[Path, int, np.ndarray], None]  # path, offset, out (bytes,) uint8


class Tensor(Protocol):
    """One tensor of a checkpoint, stored as such or put together from what is stored."""

    name: str
    path: Path  # the file, or the first of them
    dtype: str  # as safetensors spells it: F32, F16, BF16, …
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int: ...

    @property
    def origins(self) -> tuple["StoredTensor", ...]:
        """The runs of bytes that it is made of."""
        ...

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        """Rows `first:` of the tensor into `out`, C-contiguous (rows, …) of the stored dtype."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies as one run of bytes in a file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def origins(self) -> tuple["StoredTensor", ...]:
        return (self,)

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        row = self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0
        read(self.path, self.offset + first * row, out.reshape(-1).view(np.uint8))


def numpy_dtype(tensor: Tensor) -> np.dtype:
    """The dtype that the tensor is stored as.

    Raises:
        ModelError: it is not a float of 16 or 32 bits.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ModelError(
            f"{tensor.path}: {tensor.name} is stored as {tensor.dtype}",
            f"Supported: {', '.join(DTYPES)}.",
        )
    return dtype


def stored_dtype(tensor: Tensor) -> np.dtype:
    """The dtype that the tensor is stored as, quantized or not.

    Raises:
        ModelError: as `numpy_dtype`.
    """
    return QUANTIZED[tensor.dtype] if tensor.dtype in QUANTIZED else numpy_dtype(tensor)


class Checkpoint:
    """The tensors of one model directory, by name. Several threads may read at once."""

    def __init__(
        self,
        directory: Path,
        form: str,
        tensors: Mapping[str, Tensor],
        quantization: str | None = None,
        bands: int = 1,
    ):
        """
        Args:
            form: how the directory is laid out, as a manifest or a message calls it.
            quantization: of the layers' matrices: None, fp8 or int8.
            bands: of columns, into which o and down were cut before they were quantized.
        """
        self.directory = directory
        self.form = form
        self.tensors = tensors
        self.quantization = quantization
        self.bands = bands
        self._bytes_read = 0
        self._lock = threading.Lock()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, by all threads."""
        return self._bytes_read

    def count_bytes(self, count: int) -> None:
        """Add what a reader has read by itself, from where `locate` said."""
        with self._lock:
            self._bytes_read += count

    def locate(self, name: str) -> StoredTensor | None:
        """Where the tensor lies as one run of bytes; None if it must be put together."""
        tensor = self.tensors[name]
        return tensor if isinstance(tensor, StoredTensor) else None

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read the tensor into `out`, of the same number of elements, converted to its dtype.

        Raises:
            ModelError: a dtype that is not a float of 16 or 32 bits, or a file that ends early.
        """
        shape = self.tensors[name].shape
        if out.size != prod(shape):
            raise ValueError(f"{name} of shape {shape} does not fill {out.shape}")
        # A view wherever the layout allows one; only odd layouts read through a copy.
        rows = out.reshape(shape or (1,))
        self.read_rows(name, 0, rows)
        if not np.shares_memory(rows, out):
            out[...] = rows.reshape(out.shape)

    def read_rows(self, name: str, first: int, out: np.ndarray) -> None:
        """Read rows `first:first + len(out)` into `out` (rows, …), converted to its dtype.

        Raises:
            ModelError: as `read_into`.
        """
        tensor = self.tensors[name]
        dtype = QUANTIZED.get(tensor.dtype)
        if dtype != out.dtype:  # bits are read as they are, or not at all
            dtype = numpy_dtype(tensor)
        if dtype == out.dtype and out.flags.c_contiguous:
            tensor.read_rows(first, out, self._read)
            return
        step = max(1, _CONVERTED_BYTES // max(1, dtype.itemsize * prod(out.shape[1:])))
        for begin in range(0, len(out), step):
            target = out[begin : begin + step]
            values = np.empty(target.shape, dtype)
            tensor.read_rows(first + begin, values, self._read)
            with np.errstate(over="ignore"):  # beyond float16: scoring finds the infinity
                target[...] = values

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and first 4 KiB of every tensor.

        A sample: it tells models apart without reading all of their bytes. It is of the tensors,
        so it does not depend on the form of the checkpoint.
        """
        sha = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            sha.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            sha.update(sample_of(tensor))
        return sha.hexdigest()

    def _read(self, path: Path, offset: int, out: np.ndarray) -> None:
        read_bytes(path, offset, out)
        self.count_bytes(out.nbytes)


def read_bytes(path: Path, offset: int, out: np.ndarray) -> None:
    """Fill `out` (bytes,) uint8 from `offset` of the file.

    Raises:
        ModelError: the file cannot be read, or ends too early.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            view, done = memoryview(out), 0
            while done < out.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ModelError(f"{path}: ends {out.nbytes - done} bytes early", INCOMPLETE)
                done += count
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error


def sample_of(tensor: Tensor) -> bytes:
    """The first 4 KiB of a tensor, of whatever dtype."""
    if isinstance(tensor, StoredTensor):
        sample = np.empty(min(tensor.nbytes, _DIGEST_SAMPLE), np.uint8)
        read_bytes(tensor.path, tensor.offset, sample)
        return sample.tobytes()
    row = tensor.nbytes // tensor.shape[0]
    rows = min(tensor.shape[0], -(-_DIGEST_SAMPLE // row))
    values = np.empty((rows, *tensor.shape[1:]), stored_dtype(tensor))
    tensor.read_rows(0, values, read_bytes)
    return values.tobytes()[:_DIGEST_SAMPLE]


def files_of_index(index: Path, kind: str) -> dict[str, list[str]]:
    """Hugging Face's index of a checkpoint in several files: file -> the tensors it should have.

    Raises:
        ModelError: the index is unreadable, or names a file that is missing or elsewhere.
    """
    import json

    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ValueError(f"{file!r} is not the name of a file")
            names.setdefault(file, []).append(name)
    except OSError as error:
        raise ModelError(f"{index}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index}: not an index of {kind} files: {error!r}") from error
    for file in names:
        if not (index.parent / file).is_file():
            raise ModelError(
                f"{index.parent / file}: no such file, though {index.name} names it", INCOMPLETE
            )
    return names


def gather_index(
    index: Path, kind: str, tensors_of: Callable[[Path], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of all the files that an index names, each checked to be where it says.

    Raises:
        ModelError: as `files_of_index`, and for a tensor that is missing or there twice.
    """
    gathered: dict[str, Tensor] = {}
    for file, names in sorted(files_of_index(index, kind).items()):
        found = tensors_of(index.parent / file)
        for name in names:
            if name not in found:
                raise ModelError(
                    f"{index.parent / file}: has no {name}, though {index.name} says so",
                    INCOMPLETE,
                )
        for name, tensor in found.items():
            if name in gathered:
                raise ModelError(
                    f"{tensor.path}: has {name}, which {gathered[name].path.name} has too"
                )
            gathered[name] = tensor
    return gathered


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a directory, whatever its form, under Hugging Face's names of today.

    Args:
        directory: also a pattern for the names of the parts of a Metaseq checkpoint.

    Raises:
        ModelError: there is none, or its files are broken.
    """
    from cupyllama.checkpoint.names import newer_names
    from cupyllama.families import FAMILIES

    checkpoint = _open(directory)
    for family in FAMILIES.values():
        checkpoint.tensors = newer_names(checkpoint.tensors, family.names.older_prefixes)
    return checkpoint


def _open(directory: Path) -> Checkpoint:
    from cupyllama.checkpoint import meta, metaseq, pytorch, safetensors, sharded
    from cupyllama.checkpoint.metaseq_parts import has_metaseq, names_parts

    if names_parts(directory):
        return Checkpoint(directory, "metaseq", metaseq.model_tensors(directory))
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory", "--model takes a checkpoint directory.")
    if sharded.is_sharded(directory):
        return sharded.open_sharded(directory)
    if safetensors.has_safetensors(directory):
        return safetensors.SafetensorsCheckpoint(directory)
    if pytorch.has_pytorch(directory):
        return Checkpoint(directory, "pytorch", pytorch.directory_tensors(directory))
    if meta.has_meta(directory):
        return Checkpoint(directory, "meta", meta.directory_tensors(directory))
    if has_metaseq(directory):
        return Checkpoint(directory, "metaseq", metaseq.model_tensors(directory))
    raise ModelError(
        f"{directory}: has no weights: no model.safetensors, no pytorch_model.bin (or their "
        "index), no consolidated.00.pth with params.json, no reshard-model_part-0.pt and no "
        "manifest.json",
        INCOMPLETE,
    )
