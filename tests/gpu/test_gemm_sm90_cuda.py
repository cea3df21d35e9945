"""Our own matrix products against the definition of what they fuse, in poisoned memory."""

import time

import ml_dtypes
import numpy as np
import pytest

from cupyllama.ops import reference
from cupyllama.quantized import Quantized

cupy = pytest.importorskip("cupy")
cuda = pytest.importorskip("cupyllama.ops.cuda")
gemm_sm90 = pytest.importorskip("cupyllama.ops.gemm_sm90")

pytestmark = pytest.mark.gpu

FP16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
# ‖out - ref‖ / ‖ref‖: half a unit in the last place of each storage, and room for the sums.
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3}
# Sums of e4m3 keep about 14 bits, and what they lose grows with k.
FP8_TOLERANCE = 1e-2
POISON = 0xFFFF  # NaN in either type

every_dtype = pytest.mark.parametrize("dtype", [FP16, BF16], ids=lambda dtype: dtype.name)
every_kind = pytest.mark.parametrize("eight_bit", [False, True], ids=["16 bits", "fp8"])
every_epilogue = pytest.mark.parametrize("epilogue", ["swiglu", "rope 64", "rope 128"])


@pytest.fixture(autouse=True)
def hopper():
    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("needs compute capability 9.0")
    yield
    cupy.cuda.get_current_stream().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.fixture
def rng():
    seed = time.time_ns() % 2**32
    print(f"{seed=}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def host(x):
    return cuda.download(x)()


def to_device(x):
    if isinstance(x, Quantized):
        return Quantized(cuda.to_device(x.values), cuda.to_device(x.scale))
    return cuda.to_device(x)


def rows_of(x, rows):
    if isinstance(x, Quantized):
        return Quantized(np.ascontiguousarray(x.values[rows]), np.ascontiguousarray(x.scale[rows]))
    return np.ascontiguousarray(x[rows])


class Case:
    """Random operands of one product, what it should be, and the product itself."""

    def __init__(self, rng, epilogue, dtype, eight_bit, m, k, n=None, heads=(2, 1)):
        """`n`: columns of the result of swiglu; `heads`: (query, key-value) of rope."""
        name, _, head_dim = epilogue.partition(" ")
        self.dtype, self.eight_bit, self.heads, self.swiglu = dtype, eight_bit, heads, not head_dim
        self.n = n if self.swiglu else (heads[0] + 2 * heads[1]) * int(head_dim)
        # Gates of a few units and rows of unlike size: a wrong column or scale shows.
        self.x = self._operand(rng, m, k, rng.uniform(0.5, 2, (m, 1)))
        rows = 2 * self.n if self.swiglu else self.n
        self.weight = self._operand(rng, rows, k, rng.uniform(0.5, 2, (rows, 1)) / np.sqrt(k))
        self.weight_device = to_device(self.weight)
        if not self.swiglu:
            angles = rng.uniform(-np.pi, np.pi, (300, int(head_dim) // 2))
            self.tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self.tables_device = [cuda.to_device(table) for table in self.tables]
            self.positions = rng.integers(0, 300, m).astype(np.int32)

    def _operand(self, rng, rows, columns, size):
        x = rng.standard_normal((rows, columns), np.float32) * size.astype(np.float32)
        return reference.quantize(x) if self.eight_bit else x.astype(self.dtype)

    def expected(self, rows):
        """Of these rows, in float32: nothing is rounded before the end."""
        x, weight = rows_of(self.x, rows), self.weight
        if not self.eight_bit:
            x, weight = x.astype(np.float32), weight.astype(np.float32)
        product = reference.linear(x, weight, out_dtype=np.dtype(np.float32))
        if self.swiglu:
            return reference.swiglu(product)
        return reference.rope(product, self.positions[rows], *self.tables, *self.heads)

    def run(self, rows, x=None):
        """The product of these rows of x, in poisoned memory between guards."""
        x = rows_of(self.x if x is None else x, rows)
        room = cupy.full((len(x) + 2, self.n), POISON, np.uint16).view(self.dtype)
        out, x_device = room[1:-1], to_device(x)
        if self.swiglu:
            assert gemm_sm90.fits(x_device, self.weight_device, self.dtype)
            gemm_sm90.linear_swiglu(out, x_device, self.weight_device)
        else:
            head_dim = 2 * self.tables[0].shape[1]
            rotated = sum(self.heads) * head_dim
            assert gemm_sm90.fits(x_device, self.weight_device, self.dtype, head_dim)
            turn = (cuda.to_device(self.positions[rows]), *self.tables_device, rotated)
            gemm_sm90.linear_rope(out, x_device, self.weight_device, *turn)
        bits = host(room.view(np.uint16))
        assert (bits[0] == POISON).all() and (bits[-1] == POISON).all(), "wrote outside"
        return bits[1:-1].view(self.dtype)


def relative(error, expected, axis=None):
    return np.linalg.norm(error, axis=axis) / np.maximum(np.linalg.norm(expected, axis=axis), 1e-30)


def assert_close(out, expected, tolerance):
    """On the whole, and in every row and column that is long enough to be judged."""
    got, expected = out.astype(np.float64), expected.astype(np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all(), f"{np.argwhere(~np.isfinite(got))[:4].tolist()} not finite"
    error = got - expected
    assert relative(error, expected) <= tolerance
    for axis in (0, 1):
        if got.shape[axis] >= 32:
            line = relative(error, expected, axis)
            assert line.max() <= 4 * tolerance, f"{axis=} {int(line.argmax())}: {line.max():.3g}"


def assert_same_bits(a, b):
    different = np.argwhere(a.view(np.uint16) != b.view(np.uint16))
    assert len(different) == 0, f"{len(different)} of {a.size} differ, at {different[:4].tolist()}"


def everything(case):
    return np.arange(len(case.x))


# m, n of swiglu, (query, key-value) heads, elements of k: tails against every tile, one tile and
# many times the multiprocessors, k of one stage, fewer and more than the ring has, 11008 and 17920.
SHAPES = [
    (1, 64, (1, 1), 128),
    (37, 192, (2, 1), 256),
    (127, 128, (3, 1), 384),
    (129, 320, (5, 2), 512),
    (256, 256, (4, 2), 640),
    (1024, 1408, (32, 8), 4096),
    (1000, 448, (9, 3), 17920),
    (300, 11008, (52, 52), 1152),
    (8192, 2112, (14, 2), 1024),
]


@every_dtype
@every_kind
@every_epilogue
@pytest.mark.parametrize("m, n, heads, k", SHAPES)
def test_against_the_definition(rng, dtype, eight_bit, epilogue, m, n, heads, k):
    case = Case(rng, epilogue, dtype, eight_bit, m, k, n, heads)
    tolerance = max(TOLERANCE[dtype.name], FP8_TOLERANCE if eight_bit else 0)
    rows = everything(case)
    assert_close(case.run(rows), case.expected(rows), tolerance)


@every_dtype
@every_epilogue
def test_fp8_sums_that_14_bits_hold(rng, dtype, epilogue):
    """Small whole numbers: then nothing but the result is rounded."""
    case = Case(rng, epilogue, dtype, True, 300, 512, 320, (5, 2))
    for matrix in (case.x, case.weight):
        small = rng.integers(-3, 4, matrix.shape).astype(ml_dtypes.float8_e4m3fn)
        matrix.values[...] = small.view(np.uint8)
        matrix.scale[...] = rng.uniform(0.5, 2, len(matrix)) / 16
    case.weight_device = to_device(case.weight)
    rows = everything(case)
    assert_close(case.run(rows), case.expected(rows), TOLERANCE[dtype.name])


@every_kind
@every_epilogue
def test_two_runs_have_the_same_bits(rng, eight_bit, epilogue):
    case = Case(rng, epilogue, FP16, eight_bit, 2100, 2048, 1408, (10, 3))
    first = case.run(everything(case))
    for _ in range(5):
        assert_same_bits(case.run(everything(case)), first)


@every_dtype
@every_kind
@every_epilogue
def test_row_bits_depend_on_neither_place_nor_m(rng, dtype, eight_bit, epilogue):
    case = Case(rng, epilogue, dtype, eight_bit, 8192, 1024, 448, (6, 2))
    together = case.run(everything(case))
    order = rng.permutation(8192)
    assert_same_bits(case.run(order), together[order])
    for m in (1, 37, 127, 129, 1024):
        rows = rng.integers(0, 8192, m)  # some twice
        assert_same_bits(case.run(rows), together[rows])


@every_epilogue
def test_nan_and_infinity_stay_in_their_rows(rng, epilogue):
    case = Case(rng, epilogue, FP16, False, 300, 512, 192, (4, 1))
    clean, spoilt = case.run(everything(case)), case.x.copy()
    spoilt[5, 7], spoilt[130, 0], spoilt[299, 511] = np.nan, np.inf, -np.inf
    out = case.run(everything(case), spoilt)
    assert np.isnan(out[5]).all()
    assert not np.isfinite(out[[130, 299]]).any()
    others = np.setdiff1d(np.arange(300), [5, 130, 299])
    assert_same_bits(out[others], clean[others])


@every_epilogue
def test_fp8_nan_stays_in_its_row(rng, epilogue):
    case = Case(rng, epilogue, FP16, True, 300, 512, 192, (4, 1))
    clean = case.run(everything(case))
    spoilt = Quantized(case.x.values.copy(), case.x.scale.copy())
    spoilt.values[5, 7], spoilt.scale[130] = 0x7F, np.nan
    out = case.run(everything(case), spoilt)
    assert np.isnan(out[[5, 130]]).all()
    others = np.setdiff1d(np.arange(300), [5, 130])
    assert_same_bits(out[others], clean[others])


@every_dtype
def test_swiglu_of_huge_gates(dtype):
    gates = np.array([-60000, -1000, -100, -89, -20, 0, 20, 100, 60000], np.float32)
    x, weight = np.zeros((len(gates), 64), dtype), np.zeros((128, 64), dtype)
    x[:, 0], x[:, 1] = gates, 0.5
    weight[:64, 0], weight[64:, 1] = 1, 1
    out = cupy.empty((len(gates), 64), dtype)
    gemm_sm90.linear_swiglu(out, cuda.to_device(x), cuda.to_device(weight))
    gate_up = np.stack([x[:, 0], x[:, 1]], axis=1).astype(np.float32)
    expected = np.repeat(reference.swiglu(gate_up), 64, axis=1)
    smallest = 6e-8 if dtype == FP16 else 1e-30
    np.testing.assert_allclose(host(out).astype(np.float32), expected, rtol=1e-2, atol=smallest)


def test_a_place_in_memory_may_be_used_again(rng):
    """Descriptors are kept by address: neither contents nor the other sizes may be."""
    m, k, n = 300, 512, 128
    room, weights = cupy.empty(m * k, FP16), cupy.empty(2 * n * k, FP16)
    for rows, depth in ((m, k), (m, k), (17, k), (m, 256), (600, 256)):
        x, weight = room[: rows * depth].reshape(rows, depth), weights[: 2 * n * depth]
        weight = weight.reshape(2 * n, depth)
        x.set(rng.standard_normal(x.shape, np.float32).astype(FP16))
        weight.set((rng.standard_normal(weight.shape, np.float32) / np.sqrt(depth)).astype(FP16))
        out = cupy.full((rows, n), np.nan, FP16)
        gemm_sm90.linear_swiglu(out, x, weight)
        product = host(x).astype(np.float32) @ host(weight).astype(np.float32).T
        assert_close(host(out), reference.swiglu(product), TOLERANCE["float16"])


def test_no_rows():
    weight = cupy.zeros((128, 64), FP16)
    gemm_sm90.linear_swiglu(cupy.empty((0, 64), FP16), cupy.empty((0, 64), FP16), weight)


def test_what_fits():
    def fits(n, k, dtype=FP16, out_dtype=None, head_dim=None, skip=0):
        whole = cupy.zeros(8 * k + skip, dtype)
        x = whole[skip:].reshape(8, k)
        return gemm_sm90.fits(x, cupy.zeros((n, k), dtype), out_dtype or dtype, head_dim)

    assert fits(256, 64) and fits(256, 4096, BF16)
    assert fits(192, 64, head_dim=64) and fits(384, 64, head_dim=128)
    assert not fits(192, 64) and not fits(257, 64) and not fits(256, 96)
    assert not fits(256, 64, np.dtype(np.float32))
    assert not fits(256, 64, FP16, BF16) and not fits(256, 64, FP16, np.dtype(np.float32))
    assert not fits(320, 64, head_dim=80) and not fits(192, 64, head_dim=128)
    assert not fits(256, 64, skip=4)
    x, weight = (
        Quantized(cupy.zeros((256, k), np.uint8), cupy.ones(256, np.float32)) for k in (128, 128)
    )
    assert gemm_sm90.fits(x, weight, FP16) and gemm_sm90.fits(x, weight, BF16, 64)
    assert not gemm_sm90.fits(x, weight, np.dtype(np.float32))
    assert not gemm_sm90.fits(cupy.zeros((256, 128), FP16), weight, FP16)


def test_bad_arrays_are_refused():
    x, weight = cupy.zeros((8, 64), FP16), cupy.zeros((128, 64), FP16)
    with pytest.raises(AssertionError, match="bfloat16"):
        gemm_sm90.linear_swiglu(cupy.zeros((8, 64), BF16), x, weight)
    with pytest.raises(AssertionError, match="128"):
        gemm_sm90.linear_swiglu(cupy.zeros((8, 128), FP16), x, weight)
    with pytest.raises(AssertionError, match="float64"):
        tables = cupy.zeros((4, 32), np.float64), cupy.zeros((4, 32), np.float64)
        out, positions = cupy.zeros((8, 128), FP16), cupy.zeros(8, np.int32)
        gemm_sm90.linear_rope(out, x, weight, positions, *tables, 64)
