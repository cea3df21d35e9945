"""Tensors of files that torch.save wrote (1.6 and later), without torch and without running them.

Such a file is a zip of stored entries: data.pkl describes the tensors, data/0, data/1, … are the
bytes of the storages that they are views of. Tensors are read straight from those bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.checkpoint import pickles
from cupyllama.checkpoint.source import (
    INCOMPLETE,
    Read,
    StoredTensor,
    Tensor,
    gather_index,
    numpy_dtype,
    read_bytes,
)
from cupyllama.checkpoint.torch_zip import Entry, torch_entries
from cupyllama.errors import ModelError

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
_LARGEST_PICKLE = 64 << 20  # that of a model of a thousand tensors has 100 KB
_MOST_DIMENSIONS = 8
_MOST_LISTED = 5

# dtype as safetensors spells it, bytes an element
_STORAGES = {
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
    "torch.DoubleStorage": ("F64", 8),
    "torch.ByteStorage": ("U8", 1),
    "torch.CharStorage": ("I8", 1),
    "torch.BoolStorage": ("BOOL", 1),
    "torch.ShortStorage": ("I16", 2),
    "torch.IntStorage": ("I32", 4),
    "torch.LongStorage": ("I64", 8),
    "torch.storage.UntypedStorage": ("U8", 1),
}


@dataclass(frozen=True)
class _Storage:
    dtype: str
    itemsize: int
    offset: int  # in the file
    elements: int


@dataclass(frozen=True)
class _View:
    """What data.pkl says of one tensor; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class StridedTensor:
    """A view of a storage whose rows are not one run of bytes: a transposed matrix, say."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # of element 0, in the file
    nbytes: int

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        span = 1 + _last_element(self.shape, self.strides)
        nbytes = span * (self.nbytes // prod(self.shape))
        return (StoredTensor(self.name, self.path, self.dtype, (span,), self.offset, nbytes),)

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        if not out.size:
            return
        strides = self.strides
        run = np.empty(1 + _last_element(out.shape, strides), numpy_dtype(self))
        begin = self.offset + first * strides[0] * run.itemsize
        read(self.path, begin, run.view(np.uint8))
        bytes_apart = tuple(stride * run.itemsize for stride in strides)
        out[...] = np.lib.stride_tricks.as_strided(run, out.shape, bytes_apart, writeable=False)


def has_pytorch(directory: Path) -> bool:
    """Whether the directory has weights in this form."""
    return (directory / _INDEX).is_file() or (directory / _SINGLE).is_file()


def directory_tensors(directory: Path) -> Mapping[str, Tensor]:
    """The tensors of pytorch_model.bin, or of the files that its index names.

    Raises:
        ModelError: a file is missing or broken, or asks for more than tensors.
    """
    if (directory / _INDEX).is_file():
        return gather_index(directory / _INDEX, "PyTorch", file_tensors)
    return file_tensors(directory / _SINGLE)


def file_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, which must be a plain mapping of names to tensors.

    Raises:
        ModelError: the file is unreadable or malformed, wants to run something, or has a tensor
            that reaches beyond its storage.
    """
    try:
        return _tensors(path, _content(path))
    except pickles.UnsafePickle as error:
        raise ModelError(
            f"{path}: data.pkl {error}",
            "Files of weights alone are read, as torch.save writes a state_dict; nothing in them "
            "is ever run.",
        ) from error


def training_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under "model" of what a training run saved, and all the rest of it.

    Objects are `pickles.Instance`s: nothing of theirs is imported or run.

    Raises:
        ModelError: as `file_tensors`, or there is no "model".
    """
    try:
        content = dict(_content(path, pickles.holds_settings))
        model = content.pop("model", None)
        if model is None:
            found = ", ".join(map(_short, list(content)[:_MOST_LISTED]))
            raise pickles.UnsafePickle(f"has no 'model', but {found or 'nothing'}")
        return _tensors(path, model), content
    except pickles.UnsafePickle as error:
        raise ModelError(
            f"{path}: data.pkl {error}",
            "A checkpoint of a training run is read for the tensors of its 'model' and for its "
            "settings; nothing in it is ever run.",
        ) from error


def _content(path: Path, inert: Callable[[str], bool] | None = None) -> dict:
    """What data.pkl has, tensors as `_View`s."""
    entries = torch_entries(path)
    _check_little_endian(path, entries)
    reader = _Reader(entries)
    pickled = _pickle(path, entries["data.pkl"])
    content = pickles.load(pickled, reader.functions, reader.storage, inert)
    if not isinstance(content, dict):
        raise pickles.UnsafePickle("is not a mapping of names to tensors")
    return content


def _tensors(path: Path, named: Any) -> dict[str, Tensor]:
    if not isinstance(named, dict):
        raise pickles.UnsafePickle("is not a mapping of names to tensors")
    return {name: _tensor(path, name, value) for name, value in named.items()}


class _Reader:
    """Makes views of one file's storages, as its pickle asks."""

    def __init__(self, entries: Mapping[str, Entry]):
        self.entries = entries
        self.functions = {
            "collections.OrderedDict": self.ordered_dict,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.parameter,
        }

    def storage(self, persistent_id: Any) -> _Storage:
        """('storage', its type, key, device, elements), with the key of an entry data/key."""
        if not (isinstance(persistent_id, tuple) and len(persistent_id) == 5):
            raise pickles.UnsafePickle("has a persistent id that is no storage")
        tag, kind, key, _, elements = persistent_id
        if tag != "storage" or not isinstance(kind, pickles.Global) or not isinstance(key, str):
            raise pickles.UnsafePickle("has a persistent id that is no storage")
        if kind.name not in _STORAGES:
            raise pickles.UnsafePickle(f"has a storage of type {kind.name}, which is not known")
        dtype, itemsize = _STORAGES[kind.name]
        entry = self.entries.get(f"data/{key}")
        if entry is None:
            raise pickles.UnsafePickle(f"wants data/{key:.40}, which the file does not have")
        if not _is_size(elements) or elements * itemsize != entry.nbytes:
            raise pickles.UnsafePickle(
                f"says that data/{key} has {elements} elements of {itemsize} bytes, but it has "
                f"{entry.nbytes} bytes"
            )
        return _Storage(dtype, itemsize, entry.offset, elements)

    def tensor(self, storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> _View:
        if not isinstance(storage, _Storage):
            raise pickles.UnsafePickle("has a tensor without a storage")
        if not (_is_size(offset) and _are_sizes(shape) and _are_sizes(strides)):
            raise pickles.UnsafePickle("has a tensor of impossible offset, shape or strides")
        if len(shape) != len(strides):
            raise pickles.UnsafePickle(f"has a tensor of shape {shape} but strides {strides}")
        inside = offset + _last_element(shape, strides) < storage.elements
        if prod(shape) and not (inside and prod(shape) <= storage.elements):
            raise pickles.UnsafePickle(
                f"has a tensor of shape {shape}, strides {strides} and offset {offset} in a "
                f"storage of {storage.elements} elements"
            )
        return _View(storage, offset, shape, strides)

    def parameter(self, view, requires_grad, hooks) -> _View:
        if not isinstance(view, _View):
            raise pickles.UnsafePickle("has a parameter that is no tensor")
        return view

    def ordered_dict(self, *items) -> dict:
        if items:
            raise pickles.UnsafePickle("has an OrderedDict of unknown make")
        return pickles.Instance()


def _tensor(path: Path, name: Any, view: Any) -> Tensor:
    if not isinstance(name, str) or not isinstance(view, _View):
        kind = type(view).__name__
        raise pickles.UnsafePickle(f"has {_short(name)!r}, which is a {kind} and no tensor")
    storage = view.storage
    offset = storage.offset + view.offset * storage.itemsize
    nbytes = prod(view.shape) * storage.itemsize
    if view.strides == _contiguous(view.shape) or prod(view.shape) <= 1:
        return StoredTensor(name, path, storage.dtype, view.shape, offset, nbytes)
    # A dimension of 1 may have any stride, and one of 0 elements too.
    strides = tuple(
        usual if size <= 1 else stride
        for size, stride, usual in zip(
            view.shape, view.strides, _contiguous(view.shape), strict=True
        )
    )
    if strides == _contiguous(view.shape) or not nbytes:
        return StoredTensor(name, path, storage.dtype, view.shape, offset, nbytes)
    return StridedTensor(name, path, storage.dtype, view.shape, strides, offset, nbytes)


def _short(name: Any) -> str:
    return str(name)[:80]


def _pickle(path: Path, entry: Entry) -> bytes:
    if entry.nbytes > _LARGEST_PICKLE:
        raise pickles.UnsafePickle(f"has {entry.nbytes:,} bytes; that is more than tensors need")
    data = np.empty(entry.nbytes, np.uint8)
    read_bytes(path, entry.offset, data)
    return data.tobytes()


def _check_little_endian(path: Path, entries: Mapping[str, Entry]) -> None:
    """torch 2.1 and later say the byte order; before, it was the machine's."""
    entry = entries.get("byteorder", Entry(0, 0))
    order = np.empty(min(entry.nbytes, 16), np.uint8)
    read_bytes(path, entry.offset, order)
    if order.tobytes() not in (b"", b"little"):
        raise ModelError(
            f"{path}: has byte order {order.tobytes().decode(errors='replace')}",
            f"Only little-endian files are read. {INCOMPLETE}",
        )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _last_element(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _are_sizes(values: Any) -> bool:
    fits = isinstance(values, tuple) and len(values) <= _MOST_DIMENSIONS
    return fits and all(map(_is_size, values))
