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
gemm = pytest.importorskip("cupyllama.ops.gemm")
cublaslt = pytest.importorskip("cupyllama.ops.cublaslt")

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
def test_gather_reads_nothing_before_the_table(rng, dtype):
    whole = normal(rng, (11, 96), dtype)
    ids = np.array([-1, 4, -5, 3, -6], np.int32)
    out = cuda.gather(cuda.to_device(ids), cuda.to_device(whole)[6:])
    np.testing.assert_array_equal(host(out), reference.gather(ids, whole[6:]))
    np.testing.assert_array_equal(host(out)[0], whole[6])


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


@every_dtype
@pytest.mark.parametrize("hidden", [2, 96, 102, 331, 4096, 5120, 7168, 8193, 9216, 16384])
@pytest.mark.parametrize("tokens", [1, 37])
def test_layernorm(rng, dtype, tokens, hidden):
    x, (weight, bias) = normal(rng, (tokens, hidden), dtype, 3), normal(rng, (2, hidden), dtype)
    x += normal(rng, (tokens, 1), dtype, 2)
    device = [cuda.to_device(a) for a in (x, weight, bias)]
    expected = reference.layernorm(wide(x), wide(weight), wide(bias), 1e-5)
    assert_close(cuda.layernorm(*device, 1e-5), expected)
    assert_same_bits(device[0], x)  # where the caller still needs it
    assert_quantized(cuda.layernorm(*device, 1e-5, quantized=True), expected)
    assert cuda.layernorm(device[0][:0], *device[1:], 1e-5).shape == (0, hidden)


@every_dtype
@pytest.mark.parametrize("hidden", [331, 7168])
def test_layernorm_of_a_large_mean(rng, dtype, hidden):
    """What is subtracted is a thousand times what is left: squares first would lose all of it."""
    mean = np.float32(100 if dtype == BF16 else 1000)  # which has fewer digits
    x = (mean + normal(rng, (37, hidden), np.float32)).astype(dtype)
    weight, bias = normal(rng, (2, hidden), dtype)
    exact = wide(x).astype(np.float64)
    centred = exact - exact.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    out = cuda.layernorm(*(cuda.to_device(a) for a in (x, weight, bias)), 1e-5)
    tolerance = max(TOLERANCE[dtype.name], 5e-4)  # a mean of 1000 is off by some 1e-4 itself
    assert_close(out, centred / deviation * wide(weight) + wide(bias), tolerance)


@every_dtype
def test_layernorm_of_rows_without_spread(dtype):
    """Nothing is left of a constant row but the bias; NaN stays in its own."""
    x = np.full((4, 331), 2.5, dtype)
    x[1, 7], x[2] = np.nan, 0
    weight, bias = np.full(331, 3, dtype), np.arange(331).astype(dtype)
    out = host(cuda.layernorm(*(cuda.to_device(a) for a in (x, weight, bias)), 1e-5))
    assert np.isnan(wide(out[1])).all()
    np.testing.assert_array_equal(wide(out[[0, 2, 3]]), np.tile(wide(bias), (3, 1)))


@every_dtype
@pytest.mark.parametrize("tokens, hidden", [(1, 96), (7, 331), (33, 7168), (0, 96), (3, 8193)])
def test_add(rng, dtype, tokens, hidden):
    x, y = normal(rng, (tokens, hidden), dtype, 3), normal(rng, (tokens, hidden), dtype)
    x_device, y_device = cuda.to_device(x), cuda.to_device(y)
    out = cuda.add(x_device, y_device)
    assert_same_bits(out, reference.add(x, y))
    assert out is x_device
    assert_same_bits(y_device, y)


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
@pytest.mark.parametrize("tokens, depth, width", LINEAR_SHAPES)
def test_linear_relu(rng, dtype, tokens, depth, width):
    x, weight = normal(rng, (tokens, depth), dtype), normal(rng, (width, depth), dtype)
    bias = normal(rng, width, dtype, depth**0.5)
    device = [cuda.to_device(a) for a in (x, weight, bias)]
    out = cuda.linear_relu(*device)
    exact = (wide(a).astype(np.float64) for a in (x, weight, bias))
    total = next(exact) @ next(exact).T + next(exact)
    assert_close(out, np.maximum(total, 0))
    assert (host(out) >= 0).all() and (tokens * width < 1000 or (host(out) == 0).mean() > 0.2)
    assert_quantized(cuda.linear_relu(*device, quantized=True), host(out))
    wider = cuda.linear_relu(*device, out_dtype=np.float32)
    assert wider.dtype == np.float32
    assert_close(wider, np.maximum(total, 0), 1e-5)
    assert cuda.linear_relu(device[0][:0], *device[1:]).shape == (0, width)


@every_dtype
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tokens, width", [(1, 96), (37, 331), (5, 8193), (3, 28672)])
def test_a_bias_that_the_product_does_not_add(rng, dtype, relu, tokens, width):
    """What stands in where cuBLASLt has no such epilogue."""
    bias = normal(rng, width, dtype)
    for rows in (normal(rng, (tokens, width), dtype), normal(rng, (tokens, width), np.float32)):
        rows[0, width // 2] = np.nan
        expected = wide(rows) + wide(bias)
        expected = (np.maximum(expected, 0) if relu else expected).astype(rows.dtype)
        on_device = cuda.to_device(rows)
        gemm.add_bias(on_device, cuda.to_device(bias), relu)
        np.testing.assert_array_equal(wide(host(on_device)), wide(expected))


@every_dtype
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_without_epilogues(rng, dtype, relu, accumulate, monkeypatch):
    x, weight = normal(rng, (37, 331), dtype), normal(rng, (127, 331), dtype)
    bias, old = normal(rng, 127, dtype, 18), normal(rng, (37, 127), dtype, 18)
    total = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T + wide(bias)
    total += wide(old) if accumulate else 0
    device = [cuda.to_device(a) for a in (x, weight)]
    for supported in (True, False):  # with them too, where there are some
        if not supported:
            monkeypatch.setattr(cublaslt, "supports", lambda product, device: False)
        out = cuda.to_device(old)
        gemm.gemm(out, *device, accumulate, cuda.to_device(bias), relu)
        assert_close(out, np.maximum(total, 0) if relu else total)


@pytest.mark.parametrize(
    "operands, result",
    [*((dtype.name,) * 2 for dtype in DTYPES), ("float8_e4m3", "float16")],
)
def test_usual_products_have_their_epilogue(operands, result):
    """A pass of its own for the bias would take as long as a tenth of the product."""
    for others in ({"relu": True}, {"accumulate": True}, {}):
        for m in (128, 8192):
            product = cublaslt.Product(m, 4096, 4096, operands, result, bias=result, **others)
            assert cublaslt.supports(product, cupy.cuda.get_device_id()), product


def test_the_algorithm_of_a_product_is_known(rng):
    x, weight = normal(rng, (37, 344), np.float16), normal(rng, (136, 344), np.float16)
    gemm.gemm(cuda.empty((37, 136), np.float16), cuda.to_device(x), cuda.to_device(weight))
    found = [one for one in cublaslt.algorithms() if (one["n"], one["k"]) == (136, 344)]
    assert {one["m"] for one in found} == {cublaslt.NOMINAL_M}
    assert all(one["split_k"] <= 1 for one in found) and any(one["id"] for one in found)


@every_dtype
def test_nan_goes_through_relu(rng, dtype):
    """A number that is none is seen in the score, and not taken for 0."""
    x, weight = normal(rng, (130, 256), dtype), normal(rng, (128, 256), dtype)
    bias = normal(rng, 128, dtype)
    x[3, 5], weight[7, 9], bias[11] = np.nan, np.nan, np.nan
    out = host(cuda.linear_relu(*(cuda.to_device(a) for a in (x, weight, bias))))
    expected = np.zeros(out.shape, bool)
    expected[3], expected[:, [7, 11]] = True, True
    np.testing.assert_array_equal(np.isnan(wide(out)), expected)


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


@every_dtype
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 331), (33, 17920), (5, 4100), (0, 64)])
def test_quantize_as_int8(rng, dtype, rows, columns):
    x = normal(rng, (rows, columns), dtype) * (10.0 ** rng.integers(-3, 3, (rows, 1))).astype(dtype)
    if rows > 2:
        x[1], x[4] = 0, -1e-40
        x[2, 3], x[3, 5] = np.nan, -np.inf
    out = cuda.quantize(cuda.to_device(x), kind="int8")
    expected = reference.quantize(x, kind="int8")
    np.testing.assert_array_equal(host(out.scale), expected.scale)
    np.testing.assert_array_equal(host(out.values), expected.values)
    assert host(out.values).dtype == np.int8
    for storage in DTYPES:
        found, wanted = cuda.dequantize(out, storage), reference.dequantize(expected, storage)
        assert found.dtype == storage
        np.testing.assert_array_equal(wide(host(found)), wide(wanted))


@every_dtype
@pytest.mark.parametrize("tokens, depth, width", LINEAR_SHAPES)
def test_products_with_int8_are_those_of_the_array(rng, dtype, tokens, depth, width):
    """Whichever kernel multiplies; activations are not quantized."""
    x = cuda.to_device(normal(rng, (tokens, depth), dtype))
    bias = cuda.to_device(normal(rng, width, dtype))
    residual = cuda.to_device(normal(rng, (tokens, width), dtype))
    matrix = cuda.quantize(cuda.to_device(normal(rng, (width, depth), np.float32)), kind="int8")
    even = slice(0, width // 2 * 2)
    halves = cuda.Quantized(matrix.values[even], matrix.scale[even])
    array = cuda.dequantize(matrix, dtype)
    found, expected = (
        [
            cuda.linear(x, weight),
            cuda.linear(x, weight, bias, residual.copy()),
            cuda.linear(x, weight, out_dtype=np.float32),
            cuda.linear_relu(x, weight, bias),
            cuda.linear_swiglu(x, gate_up),
        ]
        for weight, gate_up in ((matrix, halves), (array, array[even]))
    )
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)
    exact = reference.dequantize(cuda.Quantized(host(matrix.values), host(matrix.scale)))
    wide_x = wide(host(x)).astype(np.float64)
    assert_close(found[0], wide_x @ exact.T.astype(np.float64), 2 * TOLERANCE[dtype.name])


@pytest.mark.parametrize("head_dim", [64, 80])
def test_linear_rope_with_int8(rng, head_dim):
    dtype, heads, tokens = np.dtype(np.float16), (4, 2), 40
    x = cuda.to_device(normal(rng, (tokens, 256), dtype))
    weight = cuda.to_device(normal(rng, (8 * head_dim, 256), dtype))
    matrix = cuda.quantize(weight, kind="int8")
    positions = cuda.to_device(np.arange(tokens, dtype=np.int32))
    angles = rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2))
    cos, sin = (cuda.to_device(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    found, expected = (
        cuda.linear_rope(x, w, None, positions, cos, sin, *heads)
        for w in (matrix, cuda.dequantize(matrix, dtype))
    )
    assert_same_bits(found, expected)


FP8_SHAPES = [(16, 64, 32), (1, 4096, 1024), (37, 352, 128), (512, 11008, 4096), (1024, 6656, 6656)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("tokens, depth, width", FP8_SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_quantized(rng, dtype, tokens, depth, width, with_residual, with_bias):
    x, weight = normal(rng, (tokens, depth), dtype), normal(rng, (width, depth), dtype)
    scale = (10.0 ** rng.uniform(-1, 1, (width, 1))).astype(np.float32)
    residual = normal(rng, (tokens, width), dtype, 5) if with_residual else None
    quantized = cuda.quantize(cuda.to_device((weight * scale).astype(dtype)))
    rounded = cuda.quantize(cuda.to_device(x))
    given = None if residual is None else cuda.to_device(residual)
    bias = normal(rng, width, dtype, depth**0.5) if with_bias else None
    added = cuda.to_device(bias) if with_bias else None
    out = cuda.linear(rounded, quantized, added, given, dtype)
    wide_x, wide_weight = (
        reference.dequantize(cuda.Quantized(host(q.values), host(q.scale))).astype(np.float64)
        for q in (rounded, quantized)
    )
    expected = wide_x @ wide_weight.T + (wide(bias) if with_bias else 0)
    # sums of about 14 bits; what e4m3 itself costs is ten times as much
    tolerance = max(TOLERANCE[dtype.name], 4e-3)
    assert_close(out, expected + (0 if residual is None else wide(residual)), tolerance)
    if residual is None:
        assert_same_bits(cuda.linear(cuda.to_device(x), quantized, added), out)
    if residual is None and with_bias:
        out = cuda.linear_relu(rounded, quantized, added, out_dtype=dtype)
        assert_close(out, np.maximum(expected, 0), tolerance)
        eight_bit = cuda.linear_relu(rounded, quantized, added, True, dtype)
        assert_quantized(eight_bit, host(out))


@every_dtype
def test_linear_of_unaligned_arrays(rng, dtype):
    x, weight = normal(rng, (64, 128), dtype), normal(rng, (96, 128), dtype)
    whole = cupy.empty(x.size + 24, dtype)
    shifted = whole[8 : 8 + x.size].reshape(x.shape)
    shifted.set(x)
    expected = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T
    assert_close(cuda.linear(shifted, cuda.to_device(weight)), expected)


# The matrices of LLaMA-7B and OPT-6.7B, and what nothing is aligned to.
MATRICES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (331, 1000)]
MATRICES += [(16384, 4096), (4096, 16384)]
EPILOGUES = ["", "residual", "bias", "bias and residual", "relu"]


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32", "fp8"])
@pytest.mark.parametrize("width, depth", MATRICES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_linear_row_bits_depend_on_nothing_else(rng, storage, width, depth, epilogue):
    """Neither on a row's place, nor on how many there are."""
    if storage == "fp8" and (width % 16 or depth % 16):
        pytest.skip("no 8-bit product of such sizes")
    dtype = np.dtype(BF16 if storage == "bfloat16" else "float16" if storage == "fp8" else storage)
    x, weight = cupy.empty((8192, depth), dtype), cupy.empty((width, depth), dtype)
    bias, old = cupy.empty(width, dtype), cupy.empty((8192, width), dtype)
    for array in (x, weight, bias, old):
        array[...] = cupy.random.standard_normal(array.shape, dtype=np.float32)
    weight = cuda.quantize(weight) if storage == "fp8" else weight
    bias = bias if epilogue.startswith(("bias", "relu")) else None

    def product(rows):
        if epilogue == "relu":
            return cuda.linear_relu(x[rows], weight, bias)
        residual = old[rows].copy() if epilogue.endswith("residual") else None
        return cuda.linear(x[rows], weight, bias, residual)

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
    with pytest.raises(AssertionError, match="instead of"):
        cuda.linear(x, x, cupy.zeros(64, cupy.float16))  # one number too many: it has 4 columns
    with pytest.raises(AssertionError, match="instead of"):
        cuda.add(x, x[:2])
