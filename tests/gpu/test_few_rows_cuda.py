"""Products of few rows against NumPy's in float64, in poisoned memory, and that their bits hold."""

import ml_dtypes
import numpy as np
import pytest
from device_arrays import BF16, assert_same_bits, host

from cupyllama.quantized import Quantized

cupy = pytest.importorskip("cupy")
cuda = pytest.importorskip("cupyllama.ops.cuda")
few_rows = pytest.importorskip("cupyllama.ops.few_rows")
few_rows_sm90 = pytest.importorskip("cupyllama.ops.few_rows_sm90")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
# ‖out - truth‖ / ‖truth‖: half a unit in the last place of each and of what cuBLASLt leaves for
# another kernel, and room for sums in float32.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 2e-5}

every_dtype = pytest.mark.parametrize("dtype", [FP16, BF16], ids=lambda dtype: dtype.name)
# int8 by mma: as on other devices than those of 9.0.
BY_MMA = "by mma"
every_kind = pytest.mark.parametrize(
    "eight_bit", [False, True, BY_MMA], ids=["16 bits", "int8", "int8 by mma"]
)
every_epilogue = pytest.mark.parametrize(
    "epilogue", ["plain", "residual", "relu", "swiglu", "rope"]
)


@pytest.fixture(autouse=True)
def kind(request, monkeypatch):
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("eight_bit") == BY_MMA:
        monkeypatch.setattr(few_rows_sm90, "fits", lambda *_: False)


@pytest.fixture
def wgmma(monkeypatch):
    """Launches of few_rows_sm90.cu, as they come."""
    if not few_rows_sm90.is_hopper(0):
        pytest.skip("needs compute capability 9.0")
    launches, launch = [], few_rows_sm90.launch

    def counted(*args):
        launches.append(args)
        return launch(*args)

    monkeypatch.setattr(few_rows_sm90, "launch", counted)
    return launches


class Case:
    """Random operands of one product, the truth, and the product itself."""

    def __init__(self, rng, epilogue, dtype, eight_bit, m, n, k, bias=True, out_dtype=None, half=8):
        """`half`: of a head of rope, of which n then has whole ones; the last is not rotated."""
        self.epilogue, self.dtype, self.out_dtype = epilogue, dtype, np.dtype(out_dtype or dtype)
        self.x = rng.standard_normal((m, k)).astype(dtype)
        size = rng.uniform(0.5, 2, (n, 1)) / np.sqrt(k)  # a wrong row or scale shows
        if eight_bit:
            values = rng.integers(-128, 128, (n, k)).astype(np.int8)
            self.weight = Quantized(values, (size[:, 0] / 64).astype(np.float32))
            self.numbers = values.astype(np.float64) * self.weight.scale[:, None]
            self.on_device = Quantized(cupy.asarray(values), cupy.asarray(self.weight.scale))
        else:
            self.weight = (rng.standard_normal((n, k)) * size).astype(dtype)
            self.numbers = self.weight.astype(np.float64)
            self.on_device = cupy.asarray(self.weight)
        has_bias = epilogue == "relu" or bias and epilogue != "swiglu"
        self.bias = rng.standard_normal(n).astype(dtype) if has_bias else None
        self.residual = rng.standard_normal((m, n)).astype(self.out_dtype)
        self.heads = (n // (2 * half) - 2, 1)
        self.positions = rng.integers(0, 300, m).astype(np.int32)
        angles = rng.uniform(-np.pi, np.pi, (300, half))
        self.tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def truth(self):
        y = self.x.astype(np.float64) @ self.numbers.T
        if self.bias is not None:
            y += self.bias.astype(np.float64)
        if self.epilogue == "residual":
            return y + self.residual.astype(np.float64)
        if self.epilogue == "relu":
            return np.maximum(y, 0)
        if self.epilogue == "swiglu":
            gate, up = np.split(y, 2, axis=1)
            return gate / (1 + np.exp(-gate)) * up
        if self.epilogue == "rope":
            cos, sin = (table[self.positions][:, None].astype(np.float64) for table in self.tables)
            heads = y.reshape(len(y), -1, 2, cos.shape[-1])
            a, b = heads[:, :-1, 0].copy(), heads[:, :-1, 1].copy()
            heads[:, :-1, 0], heads[:, :-1, 1] = a * cos - b * sin, b * cos + a * sin
        return y

    def run(self, x=None):
        if not isinstance(x, Quantized):
            x = cupy.asarray(self.x if x is None else x)
        bias = None if self.bias is None else cupy.asarray(self.bias)
        if self.epilogue == "relu":
            return few_rows.linear_relu(x, self.on_device, bias, out_dtype=self.out_dtype)
        if self.epilogue == "swiglu":
            return few_rows.linear_swiglu(x, self.on_device, out_dtype=self.out_dtype)
        if self.epilogue == "rope":
            turn = [cupy.asarray(array) for array in (self.positions, *self.tables)]
            heads, dtype = self.heads, self.out_dtype
            return few_rows.linear_rope(x, self.on_device, bias, *turn, *heads, out_dtype=dtype)
        residual = cupy.asarray(self.residual) if self.epilogue == "residual" else None
        out = few_rows.linear(x, self.on_device, bias, residual, self.out_dtype)
        assert residual is None or out is residual
        return out


def assert_true(out, truth):
    """On the whole, and in every row and column that is long enough to be judged.

    A column of which ReLU leaves next to nothing is judged by the size of the others.
    """
    tolerance = TOLERANCE[out.dtype.name]
    got = host(out).astype(np.float64)
    assert got.shape == truth.shape
    assert np.isfinite(got).all(), f"{np.argwhere(~np.isfinite(got))[:4].tolist()} not finite"
    for axis in (None, 0, 1):
        size = np.linalg.norm(truth, axis=axis)
        size = np.maximum(size, max(np.sqrt(np.mean(size**2)), 1e-30))
        error = np.linalg.norm(got - truth, axis=axis) / size
        if axis is None or got.shape[axis] >= 32:
            allowed = tolerance if axis is None else 4 * tolerance
            assert error.max() <= allowed, f"{axis=} {int(np.argmax(error))}: {error.max():.3g}"


# n and k: less than a tile and a stage, tails of both, more tiles than blocks, pieces of tiles.
SIZES = [(48, 16), (80, 1040), (272, 4096), (4096, 528), (1008, 11008), (20000, 272)]


@every_kind
@every_epilogue
@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("m", [1, 3, 5, 16, 31, 64, 129])
def test_against_the_truth(rng, eight_bit, epilogue, m, n, k):
    case = Case(rng, epilogue, FP16, eight_bit, m, n, k)
    assert_true(case.run(), case.truth())


@pytest.mark.parametrize("eight_bit", [True, BY_MMA])
@every_epilogue
@pytest.mark.parametrize("m", [1, 3])
def test_tiles_of_as_few_rows_as_gemv_takes(rng, monkeypatch, epilogue, eight_bit, m):
    monkeypatch.setattr(few_rows, "GEMV_ROWS", 0)
    for n, k in SIZES:
        case = Case(rng, epilogue, FP16, eight_bit, m, n, k)
        assert_true(case.run(), case.truth())


@every_dtype
@every_epilogue
@pytest.mark.parametrize("m", [5, 16, 17, 32, 33, 128])
def test_wgmma_against_the_truth(rng, monkeypatch, wgmma, epilogue, dtype, m):
    blocks = few_rows_sm90._blocks
    for way in (blocks, lambda places, tiles, stages: min(places, tiles * stages)):
        # as few pieces of tiles as can be, or as many
        monkeypatch.setattr(few_rows_sm90, "_blocks", way)
        for n, k in SIZES:
            case = Case(rng, epilogue, dtype, True, m, n, k)
            assert_true(case.run(), case.truth())
    assert len(wgmma) == 2 * len(SIZES)


@every_epilogue
@pytest.mark.parametrize("m", [32, 120])
def test_wgmma_by_few_blocks(rng, monkeypatch, wgmma, epilogue, m):
    """Each has the end of a tile, several whole ones and the beginning of another."""
    monkeypatch.setattr(few_rows_sm90, "multiprocessors", lambda device: 3)
    for n, k in ((2704, 4096), (1664, 528)):
        case = Case(rng, epilogue, FP16, True, m, n, k)
        assert_true(case.run(), case.truth())
    assert len(wgmma) == 2


@every_kind
@every_epilogue
@pytest.mark.parametrize("m", [1, 2, 4])
def test_gemv_by_few_blocks(rng, monkeypatch, eight_bit, epilogue, m):
    """Each has several bands of pairs, the last of them short, and goes through them in passes."""
    monkeypatch.setattr(few_rows, "multiprocessors", lambda device: 3)
    for n, k in ((416, 20480), (208, 9232)):
        case = Case(rng, epilogue, FP16, eight_bit, m, n, k)
        assert_true(case.run(), case.truth())


@every_kind
@pytest.mark.parametrize("m", [1, 16, 31, 64, 129])
def test_bfloat16_against_the_truth(rng, eight_bit, m):
    for n, k in SIZES:
        case = Case(rng, "residual", BF16, eight_bit, m, n, k)
        assert_true(case.run(), case.truth())


@every_kind
@pytest.mark.parametrize("m", [*range(1, 10), 15, 17, 32, 33, 63, 65, 127, 128, 130, 255, 256, 257])
def test_every_number_of_rows(rng, eight_bit, m):
    case = Case(rng, "residual", FP16, eight_bit, m, 1040, 1296)
    assert_true(case.run(), case.truth())


@every_kind
@pytest.mark.parametrize("n", [1, 7, 8, 9, 17, 331])
@pytest.mark.parametrize("m", [3, 40])
def test_any_number_of_columns(rng, eight_bit, m, n):
    for epilogue in ("plain", "relu"):
        case = Case(rng, epilogue, FP16, eight_bit, m, n, 1040)
        assert_true(case.run(), case.truth())


@every_kind
@pytest.mark.parametrize("half", [3, 32, 40, 48, 64, 128])
@pytest.mark.parametrize("m", [6, 20])
def test_heads_of_any_size(rng, eight_bit, m, half):
    case = Case(rng, "rope", FP16, eight_bit, m, 5 * 2 * half, 512, half=half)
    assert_true(case.run(), case.truth())


@every_dtype
@every_kind
@pytest.mark.parametrize("m", [1, 20, 100])
def test_float32_results(rng, dtype, eight_bit, m):
    """Logits: nothing but the order of sums is between them and the truth."""
    for epilogue in ("plain", "residual"):
        case = Case(rng, epilogue, dtype, eight_bit, m, 2000, 4096, out_dtype=FP32)
        assert_true(case.run(), case.truth())


@every_dtype
@pytest.mark.parametrize("k", [16, 128])
@pytest.mark.parametrize("eight_bit", [True, BY_MMA])
def test_every_byte_is_itself(dtype, eight_bit, k):
    """All 256 of them at every place, by products with one."""
    values = (np.arange(256)[:, None] + 37 * np.arange(k)).astype(np.uint8).view(np.int8)
    scale = np.ones(256, np.float32)
    x = np.zeros((k, k), dtype)
    np.fill_diagonal(x, 1)
    weight = Quantized(cupy.asarray(values), cupy.asarray(scale))
    out = few_rows.linear(cupy.asarray(x), weight, out_dtype=FP32)
    np.testing.assert_array_equal(host(out), values.T.astype(np.float32))


@every_dtype
@every_kind
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 128, 200])
def test_two_runs_have_the_same_bits(rng, dtype, eight_bit, m):
    case = Case(rng, "residual", dtype, eight_bit, m, 2064, 7168)
    first = host(case.run())
    for _ in range(20):
        assert_same_bits(case.run(), first)


@every_kind
@every_epilogue
@pytest.mark.parametrize("m", [2, 16, 32, 64, 100, 200])
def test_a_row_does_not_see_the_others(rng, eight_bit, epilogue, m):
    case = Case(rng, epilogue, FP16, eight_bit, m, 1040, 4096)
    first, other = host(case.run()), rng.standard_normal(case.x.shape).astype(FP16)
    keep = int(rng.integers(m))
    other[(keep + 1) % m] = np.nan
    other[keep] = case.x[keep]
    out = host(case.run(other))
    assert_same_bits(out[keep], first[keep])
    assert np.isnan(out[(keep + 1) % m]).all() and np.count_nonzero(out[keep] != first[keep]) == 0


@every_kind
@pytest.mark.parametrize("m", [1, 48, 300])
def test_a_graph_gives_the_same_bits(rng, eight_bit, m):
    """Captured once, replayed over other numbers."""
    case = Case(rng, "relu", FP16, eight_bit, m, 4096, 4096)
    x, bias = cupy.asarray(case.x), cupy.asarray(case.bias)
    few_rows.linear_relu(x, case.on_device, bias)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        # What must be there before a capture is of this stream's own pool too.
        few_rows.linear_relu(x, case.on_device, bias)
        stream.begin_capture()
        out = few_rows.linear_relu(x, case.on_device, bias)
        graph = stream.end_capture()
        for _ in range(3):
            rows = rng.standard_normal(case.x.shape).astype(FP16)
            x.set(rows)
            graph.launch(stream)
            stream.synchronize()
            assert_same_bits(out, few_rows.linear_relu(cupy.asarray(rows), case.on_device, bias))
        stream.synchronize()


@every_kind
@pytest.mark.parametrize("m", [1, 40])
def test_a_chain_waits_for_what_it_reads(rng, monkeypatch, eight_bit, m):
    """Each kernel reads the one before, and all write to memory that others just left."""
    case = Case(rng, "plain", FP16, eight_bit, m, 2048, 2048)
    bias = cupy.asarray(case.bias)
    norm = cupy.ones(2048, FP16)

    def chain():
        y = cupy.asarray(case.x)
        for _ in range(60):
            y = few_rows.linear(y, case.on_device, bias)
            y = few_rows.linear(y, case.on_device, bias, residual=y.copy())
            y = cuda.rmsnorm(y, norm, 1e-5)
            y = few_rows.linear(y, case.on_device, bias)
            y = cuda.layernorm(y, norm, bias, 1e-5)
        return host(y)

    early = [chain() for _ in range(3)]
    monkeypatch.setattr(few_rows, "EARLY", False)
    for other in early:
        assert_same_bits(other, chain())
    assert np.isfinite(early[0]).all()


def test_what_does_not_fit_is_right_too(rng):
    """k that is no multiple of 16 bytes, float32, and an address in between."""
    for dtype, k in ((FP16, 1036), (FP32, 512)):
        case = Case(rng, "residual", dtype, False, 3, 160, k)
        assert_true(case.run(), case.truth())
    case = Case(rng, "relu", FP16, True, 5, 160, 1032)
    assert_true(case.run(), case.truth())
    case = Case(rng, "plain", FP16, False, 3, 160, 512)
    room = cupy.zeros(3 * 512 + 1, FP16)
    room[1:] = cupy.asarray(case.x).ravel()
    assert_true(case.run(room[1:].reshape(3, 512)), case.truth())


@every_epilogue
@pytest.mark.parametrize("m", [1, 3, 16, 17, 100])
def test_fp8_against_the_truth(rng, epilogue, m):
    """Of as few rows as there are, where cuBLASLt promises products of multiples of 16."""
    if int(cupy.cuda.Device().compute_capability) < 90:
        pytest.skip("needs compute capability 9.0")
    case = Case(rng, epilogue, FP16, False, m, 1024, 4096)
    case.on_device = cuda.quantize(case.on_device)
    rows = cuda.quantize(cupy.asarray(case.x))
    case.numbers, case.x = dequantized(case.on_device), dequantized(rows)
    truth, size = case.truth(), np.linalg.norm(case.truth())
    for x in (case.x.astype(FP16), rows):  # quantized once more, the first is almost the second
        assert np.linalg.norm(host(case.run(x)) - truth) <= 1e-2 * size


def dequantized(matrix):
    values = host(matrix.values).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return values * host(matrix.scale)[:, None].astype(np.float64)


def test_as_many_rows_as_in_scoring(rng):
    for m in (1000, 2100):
        for eight_bit in (False, True):
            case = Case(rng, "swiglu", FP16, eight_bit, m, 512, 1024)
            x = cupy.asarray(case.x)
            expected = cuda.linear_swiglu(x, case.on_device)
            error = host(few_rows.linear_swiglu(x, case.on_device)) - host(expected)
            assert np.abs(error.astype(np.float64)).max() <= 0.02 * np.abs(host(expected)).max()


def test_no_rows():
    weight = cupy.zeros((128, 64), FP16)
    x = cupy.zeros((0, 64), FP16)
    assert few_rows.linear(x, weight).shape == (0, 128)
    assert few_rows.linear_swiglu(x, weight).shape == (0, 64)


def test_bad_arrays_are_refused():
    x, weight = cupy.zeros((3, 64), FP16), cupy.zeros((128, 64), FP16)
    with pytest.raises(AssertionError, match="63"):
        few_rows.linear(x, weight[:, :63])
    with pytest.raises(AssertionError, match="float32"):
        few_rows.linear(x, weight, cupy.zeros(128, np.float32))
    with pytest.raises(AssertionError, match="127"):
        few_rows.linear(x, weight, cupy.zeros(127, FP16))


def test_blocks_with_little_shared_memory(rng, monkeypatch):
    """What other GPUs would run: shorter rings, other tiles, and those for fewer rows."""
    for function in (few_rows._tile, few_rows._gemv_constants):
        function.cache_clear()
    monkeypatch.setattr(few_rows, "_shared_bytes", lambda device: 99 * 1024)
    monkeypatch.setattr(few_rows_sm90, "fits", lambda *_: False)
    for eight_bit in (False, True):
        for m in (1, 3, 8, 12, 30, 60, 100):
            case = Case(rng, "residual", FP16, eight_bit, m, 1040, 4096)
            assert_true(case.run(), case.truth())
    for function in (few_rows._tile, few_rows._gemv_constants):
        function.cache_clear()
