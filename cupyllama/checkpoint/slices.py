"""A checkpoint as one rank of a tensor-parallel group has it: the same tensors, narrower.

What reads it knows nothing of that. Rows of a matrix are a run of bytes still; of columns, each row
is one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from cupyllama.checkpoint.fields import check_names, embedding_name, tensor_sizes
from cupyllama.checkpoint.joined import JoinedTensor
from cupyllama.checkpoint.source import Checkpoint, Read, StoredTensor, Tensor, stored_dtype
from cupyllama.config import ModelConfig, Share
from cupyllama.errors import ModelError
from cupyllama.tensor_parallel import span

_BAND_BYTES = 4 << 20  # of whole rows, read at a time for some of their columns
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredColumns:
    """Some columns of a matrix that lies as one run of bytes in a file."""

    whole: StoredTensor
    columns: range

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def path(self) -> Path:
        return self.whole.path

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.whole.shape[0], len(self.columns))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * stored_dtype(self).itemsize

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """All between the first byte and the last."""
        (rows, width), itemsize = self.whole.shape, stored_dtype(self).itemsize
        count = (rows - 1) * width + len(self.columns)
        offset = self.whole.offset + self.columns.start * itemsize
        return (StoredTensor(self.name, self.path, self.dtype, (count,), offset, count * itemsize),)

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Elements `first:first + count` of this tensor as runs of the file: offset and count."""
        itemsize, width = stored_dtype(self).itemsize, self.whole.shape[1]
        while count > 0:
            row, column = divmod(first, len(self.columns))
            here = min(len(self.columns) - column, count)
            element = row * width + self.columns.start + column
            yield self.whole.offset + element * itemsize, here
            first, count = first + here, count - here

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        _read_columns(self.whole, self.columns, first, out, read)


@dataclass(frozen=True)
class BandScales:
    """Scales of a matrix whose columns were quantized in bands: a vector of them for each band."""

    bands: tuple[StoredTensor, ...]

    @property
    def name(self) -> str:
        return self.bands[0].name

    @property
    def path(self) -> Path:
        return self.bands[0].path

    @property
    def dtype(self) -> str:
        return self.bands[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bands[0].shape

    @property
    def nbytes(self) -> int:
        return self.bands[0].nbytes

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        return self.bands

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        """Of the first band: a sample of what there is."""
        self.bands[0].read_rows(first, out, read)


@dataclass(frozen=True)
class _Slice:
    """Some rows or columns of a tensor that is put together while it is read."""

    whole: Tensor
    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    axis: int
    span: range

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * stored_dtype(self).itemsize

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        return self.whole.origins

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        if self.axis == 0:
            self.whole.read_rows(self.span.start + first, out, read)
        else:
            _read_columns(self.whole, self.span, first, out, read)


def part_of_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, share: Share | None
) -> Checkpoint:
    """The tensors of one rank, those of `part_of(config, share)`.

    Args:
        config: of the whole model, whose sizes can be shared.

    Raises:
        ModelError: a tensor is missing, misshapen or unknown; or the matrices are quantized in
            bands of columns that are not those of ranks.
    """
    size = 1 if share is None else share.size
    if size % checkpoint.bands:
        raise ModelError(
            f"{checkpoint.directory}: was made {checkpoint.quantization} for --tensor-parallel "
            f"{checkpoint.bands}, with scales that do not go with {size}",
            f"Give {checkpoint.bands} or a multiple of it, or shard the original again.",
        )
    if share is None:
        return checkpoint
    check_names(checkpoint, config)
    tensors = dict(checkpoint.tensors)
    for name, sizes in tensor_sizes(config, checkpoint.quantization).items():
        for axis, size in enumerate(sizes):
            own = span(config, size, share)
            if own != range(getattr(config, size)):
                tensors[name] = sliced(tensors[name], axis, own)
        if isinstance(scales := tensors[name], BandScales):
            tensors[name] = scales.bands[share.rank * checkpoint.bands // share.size]
    if config.tie_word_embeddings:
        rows = share.vocabulary(config.vocab_size)
        tensors[_HEAD] = sliced(tensors[embedding_name(config)], 0, rows)
    return Checkpoint(checkpoint.directory, checkpoint.form, tensors, checkpoint.quantization)


def sliced(tensor: Tensor, axis: int, part: range) -> Tensor:
    """Rows (axis 0) or columns (axis 1) of a tensor, from as few of its bytes as can be."""
    if part == range(tensor.shape[axis]):
        return tensor
    shape = tuple(len(part) if i == axis else size for i, size in enumerate(tensor.shape))
    if isinstance(tensor, StoredTensor) and axis == 0:
        row = tensor.nbytes // tensor.shape[0]
        offset = tensor.offset + part.start * row
        return replace(tensor, shape=shape, offset=offset, nbytes=len(part) * row)
    if isinstance(tensor, StoredTensor):
        return StoredColumns(tensor, part)
    if isinstance(tensor, JoinedTensor) and tensor.head_dim == 1:
        return _sliced_parts(tensor, axis, part, shape)
    return _Slice(tensor, tensor.name, tensor.path, tensor.dtype, shape, axis, part)


def whole(parts: Sequence[StoredTensor], sizes: tuple[str, ...], config: ModelConfig) -> Tensor:
    """What `sliced` would make the parts of: those that differ side by side.

    Args:
        parts: one for each rank.
        sizes: the shape of the whole, in names of the config.
    """
    for axis, size in enumerate(sizes):
        spans = [span(config, size, Share(rank, len(parts))) for rank in range(len(parts))]
        if spans[0] != range(getattr(config, size)):
            # Where ranks have the same key-value heads, one of them will do.
            distinct = {own.start: part for own, part in zip(spans, parts, strict=True)}
            joined = tuple(distinct[start] for start in sorted(distinct))
            shape = tuple(getattr(config, name) for name in sizes)
            return JoinedTensor(parts[0].name, parts[0].path, parts[0].dtype, shape, joined, axis)
    return parts[0]


def _sliced_parts(tensor: JoinedTensor, axis: int, part: range, shape: tuple[int, ...]) -> Tensor:
    if axis != tensor.axis:
        parts = [sliced(one, axis, part) for one in tensor.parts]
    else:
        parts, at = [], 0
        for one in tensor.parts:
            size = one.shape[axis]
            own = range(max(part.start - at, 0), min(part.stop - at, size))
            if own:
                parts.append(sliced(one, axis, own))
            at += size
    if len(parts) == 1:
        return parts[0]
    return replace(tensor, shape=shape, parts=tuple(parts), path=parts[0].path)


def _read_columns(whole: Tensor, columns: range, first: int, out: np.ndarray, read: Read) -> None:
    """Rows of some columns, of whole rows in bands."""
    row = whole.shape[1] * out.itemsize
    step = max(1, _BAND_BYTES // row)
    for begin in range(0, len(out), step):
        target = out[begin : begin + step]
        band = np.empty((len(target), whole.shape[1]), out.dtype)
        whole.read_rows(first + begin, band, read)
        target[...] = band[:, columns.start : columns.stop]
