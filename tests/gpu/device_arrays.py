"""Arrays on the device, and how tests compare them."""

import ml_dtypes
import numpy as np
import pytest

cuda = pytest.importorskip("cupyllama.ops.cuda")

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BF16, np.dtype(np.float32)]
# ‖out - ref‖ / ‖ref‖: half a unit in the last place of each storage, and room for the sums.
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-5}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)


def normal(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def host(x):
    return cuda.download(x)()


def wide(x):
    return x.astype(np.float32)


def assert_close(out, expected, tolerance=None):
    tolerance = tolerance or TOLERANCE[out.dtype.name]
    out = out if isinstance(out, np.ndarray) else host(out)
    got, expected = out.astype(np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} not finite"
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= tolerance, f"{error=:.3g} {tolerance=}"


def assert_same_bits(a, b):
    a, b = (x if isinstance(x, np.ndarray) else host(x) for x in (a, b))
    assert a.dtype == b.dtype and a.shape == b.shape
    different = np.count_nonzero(a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}"))
    assert different == 0, f"{different} of {a.size} differ"
