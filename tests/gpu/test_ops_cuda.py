"""Each CUDA operation against its definition, on fresh random inputs and in poisoned memory."""

import ml_dtypes
import numpy as np
import pytest
from device_arrays import (
    BF16,
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_same_bits,
    every_dtype,
    host,
    normal,
    wide,
)

from cupyllama.ops import reference

cupy = pytest.importorskip("cupy")
cuda = pytest.importorskip("cupyllama.ops.cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def assert_quantized(out, expected):
    """As the reference does it, but where float32 sums put a number to the other side of a tie."""
    expected = reference.quantize(expected.astype(np.float32))
    scale, values = host(out.scale), host(out.values)
    np.testing.assert_allclose(scale, expected.scale, rtol=1e-5)
    got, want = (
        x.view(ml_dtypes.float8_e4m3fn).astype(np.float32) for x in (values, expected.values)
    )
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    apart = np.nan_to_num(np.abs(got - want))
    assert (apart <= np.maximum(np.abs(np.nan_to_num(want)) / 7.9, 2**-9)).all()  # one step at most
    assert np.count_nonzero(apart) <= 1 + 0.002 * apart.size


@every_dtype
def test_arrays_travel(rng, dtype):
    x = normal(rng, (5, 7), dtype)
    assert_same_bits(cuda.to_device(x), cuda.to_device(x.copy()))
    np.testing.assert_array_equal(host(cuda.to_device(x)), x)
    assert cuda.empty((2, 3), dtype).dtype == dtype


@every_dtype
@pytest.mark.parametrize("tokens, hidden", [(1, 96), (7, 331), (33, 6656), (0, 96), (3, 8193)])
def test_gather(rng, dtype, tokens, hidden):
    weight = normal(rng, (50, hidden), dtype)
    ids = rng.integers(0, 50, tokens).astype(np.int32)
    out = cuda.gather(cuda.to_device(ids), cuda.to_device(weight))
    np.testing.assert_array_equal(host(out), weight[ids])


@every_dtype
@pytest.mark.parametrize("hidden", [2, 96, 331, 4096, 5120, 6656, 8192, 8193, 16384])
@pytest.mark.parametrize("tokens", [1, 37])
def test_rmsnorm(rng, dtype, tokens, hidden):
    x, weight = normal(rng, (tokens, hidden), dtype, 3), normal(rng, hidden, dtype)
    x_device, weight_device = cuda.to_device(x), cuda.to_device(weight)
    expected = reference.rmsnorm(wide(x), wide(weight), 1e-6)
    assert_close(cuda.rmsnorm(x_device, weight_device, 1e-6), expected)
    assert_quantized(cuda.rmsnorm(x_device, weight_device, 1e-6, quantized=True), expected)
    assert cuda.rmsnorm(x_device[:0], weight_device, 1e-6).shape == (0, hidden)


LINEAR_SHAPES = [(1, 96, 64), (37, 331, 127), (512, 4096, 1024), (130, 1000, 331)]


@every_dtype
@pytest.mark.parametrize("tokens, depth, width", LINEAR_SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear(rng, dtype, tokens, depth, width, with_bias, with_residual):
    x, weight = normal(rng, (tokens, depth), dtype), normal(rng, (width, depth), dtype)
    bias = normal(rng, width, dtype, 5) if with_bias else None
    residual = normal(rng, (tokens, width), dtype, 5) if with_residual else None
    arrays = (x, weight, bias, residual)
    device = [None if a is None else cuda.to_device(a) for a in arrays]
    out = cuda.linear(*device)
    upcast = [None if a is None else wide(a).astype(np.float64) for a in arrays]
    expected = upcast[0] @ upcast[1].T + sum(a for a in upcast[2:] if a is not None)
    assert_close(out, expected)
    if with_residual:
        assert out.data.ptr == device[3].data.ptr


@every_dtype
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_float32_out(rng, dtype, with_bias):
    x, weight = normal(rng, (65, 4096), dtype), normal(rng, (331, 4096), dtype)
    bias = normal(rng, 331, dtype, 50) if with_bias else None
    bias_device = cuda.to_device(bias) if with_bias else None
    out = cuda.linear(cuda.to_device(x), cuda.to_device(weight), bias_device, out_dtype=np.float32)
    expected = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T
    assert out.dtype == np.float32
    assert_close(out, expected + (wide(bias) if with_bias else 0), 1e-5)


@every_dtype
@pytest.mark.parametrize("rows, columns", [(1, 16), (7, 331), (33, 17920), (5, 4096), (0, 64)])
def test_quantize(rng, dtype, rows, columns):
    x = normal(rng, (rows, columns), dtype) * (10.0 ** rng.integers(-3, 3, (rows, 1))).astype(dtype)
    if rows > 2:
        x[1] = 0
        x[2, 3], x[3, 5] = np.nan, np.inf
    out = cuda.quantize(cuda.to_device(x))
    expected = reference.quantize(x)
    np.testing.assert_array_equal(host(out.scale), expected.scale)
    np.testing.assert_array_equal(host(out.values) & 127, expected.values & 127)  # -0 is 0
    given = cuda.Quantized(cupy.zeros((rows, columns), np.uint8), cupy.zeros(rows, np.float32))
    assert cuda.quantize(cuda.to_device(x), given) is given
    np.testing.assert_array_equal(host(given.values), host(out.values))


FP8_SHAPES = [(16, 64, 32), (1, 4096, 1024), (37, 352, 128), (512, 11008, 4096), (1024, 6656, 6656)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("tokens, depth, width", FP8_SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear_quantized(rng, dtype, tokens, depth, width, with_residual):
    x, weight = normal(rng, (tokens, depth), dtype), normal(rng, (width, depth), dtype)
    scale = (10.0 ** rng.uniform(-1, 1, (width, 1))).astype(np.float32)
    residual = normal(rng, (tokens, width), dtype, 5) if with_residual else None
    quantized = cuda.quantize(cuda.to_device((weight * scale).astype(dtype)))
    rounded = cuda.quantize(cuda.to_device(x))
    given = None if residual is None else cuda.to_device(residual)
    out = cuda.linear(rounded, quantized, None, given, dtype)
    wide_x, wide_weight = (
        reference.dequantize(cuda.Quantized(host(q.values), host(q.scale))).astype(np.float64)
        for q in (rounded, quantized)
    )
    expected = wide_x @ wide_weight.T + (0 if residual is None else wide(residual))
    # sums of about 14 bits; what e4m3 itself costs is ten times as much
    assert_close(out, expected, max(TOLERANCE[dtype.name], 4e-3))
    if residual is None:
        assert_same_bits(cuda.linear(cuda.to_device(x), quantized), out)


@every_dtype
def test_linear_of_unaligned_arrays(rng, dtype):
    x, weight = normal(rng, (64, 128), dtype), normal(rng, (96, 128), dtype)
    whole = cupy.empty(x.size + 24, dtype)
    shifted = whole[8 : 8 + x.size].reshape(x.shape)
    shifted.set(x)
    expected = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T
    assert_close(cuda.linear(shifted, cuda.to_device(weight)), expected)


# The matrices of LLaMA-7B, and what nothing is aligned to.
MATRICES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (331, 1000)]


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32", "fp8"])
@pytest.mark.parametrize("width, depth", MATRICES)
@pytest.mark.parametrize("residual", [False, True])
def test_linear_row_bits_depend_on_nothing_else(rng, storage, width, depth, residual):
    """Neither on a row's place, nor on how many there are."""
    if storage == "fp8" and (width % 16 or depth % 16):
        pytest.skip("no 8-bit product of such sizes")
    dtype = np.dtype(BF16 if storage == "bfloat16" else "float16" if storage == "fp8" else storage)
    x, weight = cupy.empty((8192, depth), dtype), cupy.empty((width, depth), dtype)
    for array in (x, weight):
        array[...] = cupy.random.standard_normal(array.shape, dtype=np.float32)
    weight = cuda.quantize(weight) if storage == "fp8" else weight
    old = cupy.zeros((8192, width), dtype)
    old[...] = cupy.random.standard_normal(old.shape, dtype=np.float32)

    def product(rows):
        return cuda.linear(x[rows], weight, residual=old[rows].copy() if residual else None)

    everything = product(slice(None))
    order = cupy.asarray(rng.permutation(8192))
    assert_same_bits(product(order), everything[order])
    for first, last in ((0, 1), (8191, 8192), (5, 42), (300, 428), (1024, 2048), (7, 5000)):
        assert_same_bits(product(slice(first, last)), everything[first:last])


@every_dtype
@pytest.mark.parametrize("head_dim", [2, 32, 64, 80, 96, 100, 128, 256])
@pytest.mark.parametrize("tokens, heads, kv_heads", [(1, 4, 4), (37, 8, 2)])
def test_rope(rng, dtype, head_dim, tokens, heads, kv_heads):
    qkv = normal(rng, (tokens, (heads + 2 * kv_heads) * head_dim), dtype)
    positions = rng.integers(0, 4000, tokens).astype(np.int32)
    angles = rng.uniform(-np.pi, np.pi, (4000, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected = reference.rope(wide(qkv), positions, cos, sin, heads, kv_heads)
    out = cuda.rope(*(cuda.to_device(a) for a in (qkv, positions, cos, sin)), heads, kv_heads)
    assert_close(out, expected)
    values = (heads + kv_heads) * head_dim
    np.testing.assert_array_equal(host(out)[:, values:], qkv[:, values:])


@every_dtype
@pytest.mark.parametrize("tokens, intermediate", [(1, 96), (7, 331), (33, 17920), (5, 11008)])
def test_swiglu(rng, dtype, tokens, intermediate):
    gate_up = normal(rng, (tokens, 2 * intermediate), dtype, 4)
    out = cuda.swiglu(cuda.to_device(gate_up))
    expected = reference.swiglu(wide(gate_up))
    assert_close(out, expected)
    assert_quantized(cuda.swiglu(cuda.to_device(gate_up), quantized=True), expected)


@every_dtype
def test_swiglu_of_huge_gates(dtype):
    gate = np.array([-60000, -1000, -100, -88, -20, 0, 20, 100, 60000], np.float32)
    gate_up = np.concatenate([gate, np.full_like(gate, 0.5)])[None].astype(dtype)
    out = host(cuda.swiglu(cuda.to_device(gate_up))).astype(np.float32)
    smallest = 6e-8 if dtype == np.float16 else 1e-30
    np.testing.assert_allclose(out, reference.swiglu(wide(gate_up)), rtol=1e-2, atol=smallest)


@pytest.mark.parametrize("vocab", [1, 331, 32000, 128256])
@pytest.mark.parametrize("rows", [1, 37])
def test_log_probs(rng, vocab, rows):
    logits = normal(rng, (rows, vocab), np.float32, 6)
    logits[:, : vocab // 2] -= 200
    logits[0, vocab // 3] = logits[0, vocab // 4] = logits[0].max()  # a tie for the first place
    counts = rng.integers(0, 4, rows)
    counts[0] = 3
    target_start = (5 + np.concatenate([[0], np.cumsum(counts)])).astype(np.int32)
    target_token = rng.integers(0, vocab, target_start[-1] + 4).astype(np.int32)
    target_token[5:7] = vocab // 3, vocab // 4
    out = np.full((2, len(target_token)), 7, np.float32)
    device = [cuda.to_device(a) for a in (logits, target_start, target_token, out)]
    reference.log_probs(logits.astype(np.float64), target_start, target_token, out)
    cuda.log_probs(*device)
    got = host(device[3])
    np.testing.assert_allclose(got[0], out[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(got[1], out[1])


def test_log_probs_edges():
    logits = np.full((3, 4096), -np.inf, np.float32)
    logits[0, 4095] = 3
    logits[1, 17] = np.nan
    logits[2, :2] = 1e30, -1e30
    device = [cuda.to_device(logits)]
    device += [cuda.to_device(np.array(a, np.int32)) for a in ([0, 2, 3, 4], [4095, 0, 5, 0])]
    out = cuda.empty((2, 4), np.float32)
    cuda.log_probs(*device, out)
    got = host(out)
    np.testing.assert_array_equal(got[0], [0, -np.inf, np.nan, 0])
    np.testing.assert_array_equal(got[1, [0, 1, 3]], [1, 0, 1])


def test_log_probs_row_bits_do_not_depend_on_place(rng):
    logits = normal(rng, (64, 32000), np.float32, 5)
    tokens = rng.integers(0, 32000, 64).astype(np.int32)
    order = rng.permutation(64)
    target_start = cuda.to_device(np.arange(65, dtype=np.int32))
    results = []
    for rows in (np.arange(64), order):
        out = cuda.empty((2, 64), np.float32)
        device = cuda.to_device(logits[rows]), target_start, cuda.to_device(tokens[rows])
        cuda.log_probs(*device, out)
        results.append(host(out))
    assert_same_bits(results[1], results[0][:, order])


def test_bad_arrays_are_refused():
    x = cupy.zeros((4, 64), cupy.float16)
    with pytest.raises(AssertionError, match="float32"):
        cuda.rmsnorm(x, cupy.zeros(64, cupy.float32), 1e-6)
    with pytest.raises(AssertionError, match="strides"):
        cuda.swiglu(cupy.zeros((64, 4), cupy.float16).T)
    with pytest.raises(AssertionError, match="instead of"):
        cuda.rmsnorm(x, cupy.zeros(63, cupy.float16), 1e-6)
