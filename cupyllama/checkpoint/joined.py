"""A tensor of which several files have a part each, joined while it is read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cupyllama.checkpoint.source import Read, StoredTensor, Tensor, stored_dtype
from cupyllama.errors import ModelError

_BLOCK_BYTES = 16 << 20  # of one part, read at a time while parts are joined


@dataclass(frozen=True)
class JoinedTensor:
    """The parts of one matrix side by side, its rows reordered within heads if it is rotary."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Tensor, ...]
    axis: int
    head_dim: int = 1  # rows that belong together; 1 unless the rows are reordered

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        return tuple(origin for part in self.parts for origin in part.origins)

    def read_rows(self, first: int, out: np.ndarray, read: Read) -> None:
        step = self.head_dim * max(1, _BLOCK_BYTES // (self._row_bytes * self.head_dim))
        last = first + len(out)
        begin = first - first % self.head_dim
        while begin < last:
            end = min(begin + step, last + -last % self.head_dim)
            block = self._rows(begin, end, read)
            low, high = max(begin, first), min(end, last)
            out[low - first : high - first] = block[low - begin : high - begin]
            begin = end

    @property
    def _row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def _rows(self, begin: int, end: int, read: Read) -> np.ndarray:
        """Rows `begin:end`, whole heads of them if they are reordered."""
        block = np.empty((end - begin, *self.shape[1:]), stored_dtype(self))
        at = 0  # row of self.shape where the part begins, or its column
        for part in self.parts:
            size = part.shape[self.axis]
            if self.axis == 1:
                columns = np.empty((len(block), size), block.dtype)
                part.read_rows(begin, columns, read)
                block[:, at : at + size] = columns
            else:
                low, high = max(begin, at), min(end, at + size)
                if low < high:
                    part.read_rows(low - at, block[low - begin : high - begin], read)
            at += size
        if self.head_dim == 1:
            return block
        pairs = block.reshape(-1, self.head_dim // 2, 2, self.shape[1])
        return pairs.swapaxes(1, 2).reshape(block.shape)


def misfit(first: Tensor, part: Tensor) -> ModelError:
    """What to say of a part that is not of the model that the first part is of."""
    return ModelError(
        f"{part.path}: {part.name} is {list(part.shape)} {part.dtype}, which does not fit "
        f"{list(first.shape)} {first.dtype} in {first.path.name}",
        "Do all parts belong to the same model?",
    )
