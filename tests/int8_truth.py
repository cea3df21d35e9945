"""What int8 weights should be, a number at a time."""

import numpy as np


def quantized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of any dtype -> values int8, scale float32."""
    values, scales = np.zeros(rows.shape, np.int8), np.ones(len(rows), np.float32)
    for row, out, number in zip(rows, values, range(len(rows)), strict=True):
        x = [np.float32(float(v)) for v in row]
        if not all(np.isfinite(v) for v in x):
            scales[number] = np.inf
            continue
        scale = max((abs(v) for v in x), default=np.float32(0)) / np.float32(127)
        if scale >= np.float32(2.0**-126):
            scales[number] = scale
            inverse = np.float32(1) / scale
            out[:] = [round(float(v * inverse)) for v in x]  # Python rounds a half to even
    return values, scales
