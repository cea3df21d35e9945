"""Matrices of 8-bit numbers with a scale a row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or cupy.ndarray

# What --quantize may be: the largest number of each, and the dtype of its values.
LARGEST = {
    "fp8": 448.0,  # e4m3 of Micikevicius et al. 2022: no infinity, one NaN
    "int8": 127.0,  # and -127: as far to either side
}
VALUE_DTYPES = {"fp8": np.dtype(np.uint8), "int8": np.dtype(np.int8)}


@dataclass(frozen=True)
class Quantized:
    """`scale[row] * values[row]`: weights by output channel, activations by token."""

    values: Array  # (rows, columns) uint8, the bits of e4m3, or int8
    scale: Array  # (rows,) float32

    @property
    def kind(self) -> str:
        """fp8 or int8."""
        return "int8" if self.values.dtype == np.int8 else "fp8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)


def quantizes_activations(weight: Array | Quantized) -> bool:
    """Whether what is multiplied with it is quantized too: with fp8 it is, with int8 it is not."""
    return isinstance(weight, Quantized) and weight.kind == "fp8"
