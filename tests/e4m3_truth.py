"""What fp8 weights should be, from the numbers that the 256 bytes stand for."""

import ml_dtypes
import numpy as np

# By the definition of e4m3 (Micikevicius et al. 2022): bias 7, 3 bits of mantissa, no infinity.
CODES = np.arange(0x7F, dtype=np.uint8)  # of the finite numbers from 0 up to 448, in their order
NUMBERS = np.array(
    [
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent, mantissa in ((code >> 3, code & 7) for code in range(0x7F))
    ]
)
MIDDLES = (NUMBERS[1:] + NUMBERS[:-1]) / 2


def nearest(x: np.ndarray) -> np.ndarray:
    """Finite numbers -> the bits of the nearest e4m3, of two the even one."""
    magnitude = np.abs(x.astype(np.float64))
    low = np.searchsorted(MIDDLES, magnitude, side="left")  # a middle itself stays below it
    low += (low < len(MIDDLES)) & (low % 2 == 1) & (magnitude == np.append(MIDDLES, np.inf)[low])
    return CODES[low] | (np.signbit(x).astype(np.uint8) << 7)


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of any dtype -> values uint8, scale float32, a row at a time."""
    values, scales = np.empty(rows.shape, np.uint8), np.empty(len(rows), np.float32)
    for row, out, number in zip(rows, values, range(len(rows)), strict=True):
        x = np.array([float(v) for v in row], np.float32)
        largest = max((abs(v) for v in x if not np.isnan(v)), default=np.float32(0))
        scale = np.float32(largest) / np.float32(448)
        if scale < np.float32(2.0**-126):
            scale = np.float32(1)
        scaled = np.clip(x * (np.float32(1) / scale), np.float32(-448), np.float32(448))
        broken = np.isnan(x)
        out[:] = np.where(broken, 0, nearest(np.where(broken, 0, scaled)))
        out[broken] = ml_dtypes.float8_e4m3fn(np.nan).view(np.uint8) | np.signbit(x[broken]) << 7
        scales[number] = scale
    return values, scales
