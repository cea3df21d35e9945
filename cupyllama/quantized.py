"""Matrices of 8-bit numbers with a scale a row."""

from dataclasses import dataclass
from typing import Any

Array = Any  # numpy.ndarray or cupy.ndarray

# What --quantize may be, and the largest number of each.
LARGEST = {"fp8": 448.0}  # e4m3 of Micikevicius et al. 2022: no infinity, one NaN


@dataclass(frozen=True)
class Quantized:
    """`scale[row] * values[row]`: weights by output channel, activations by token."""

    values: Array  # (rows, columns) uint8, the bits of e4m3
    scale: Array  # (rows,) float32

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)
