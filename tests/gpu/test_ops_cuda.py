"""Each CUDA operation against its definition, on fresh random inputs and in poisoned memory."""

import time

import ml_dtypes
import numpy as np
import pytest

from cupyllama.ops import reference
from cupyllama.packing import TokenRow, pack

cupy = pytest.importorskip("cupy")
cuda = pytest.importorskip("cupyllama.ops.cuda")

pytestmark = pytest.mark.gpu

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BF16, np.dtype(np.float32)]
# ‖out - ref‖ / ‖ref‖: half a unit in the last place of each storage, and room for the sums.
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-5}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)


@pytest.fixture
def rng():
    seed = time.time_ns() % 2**32
    print(f"{seed=}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def poison():
    """What the memory pool hands out next holds NaN wherever nobody writes."""
    block = cupy.full(1 << 28, 0xFF, cupy.uint8)
    del block
    yield
    cupy.cuda.get_current_stream().synchronize()
    cupy.get_default_memory_pool().free_all_blocks()


def normal(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def host(x):
    return cuda.download(x)()


def wide(x):
    return x.astype(np.float32)


def assert_close(out, expected, tolerance=None):
    tolerance = tolerance or TOLERANCE[out.dtype.name]
    got, expected = host(out).astype(np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all(), f"{np.count_nonzero(~np.isfinite(got))} not finite"
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= tolerance, f"{error=:.3g} {tolerance=}"


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


def assert_same_bits(a, b):
    a, b = (x if isinstance(x, np.ndarray) else host(x) for x in (a, b))
    assert a.dtype == b.dtype and a.shape == b.shape
    different = np.count_nonzero(a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}"))
    assert different == 0, f"{different} of {a.size} differ"


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


def test_linear_quantized_row_bits_do_not_depend_on_place(rng):
    x, weight = normal(rng, (1024, 4096), np.float16), normal(rng, (1024, 4096), np.float16)
    quantized, order = cuda.quantize(cuda.to_device(weight)), rng.permutation(1024)
    out = cuda.linear(cuda.to_device(x), quantized)
    moved = cuda.linear(cuda.to_device(x[order]), quantized)
    assert_same_bits(moved, host(out)[order])


@every_dtype
def test_linear_of_unaligned_arrays(rng, dtype):
    x, weight = normal(rng, (64, 128), dtype), normal(rng, (96, 128), dtype)
    whole = cupy.empty(x.size + 24, dtype)
    shifted = whole[8 : 8 + x.size].reshape(x.shape)
    shifted.set(x)
    expected = wide(x).astype(np.float64) @ wide(weight).astype(np.float64).T
    assert_close(cuda.linear(shifted, cuda.to_device(weight)), expected)


@every_dtype
@pytest.mark.parametrize("width, depth", [(1024, 4096), (331, 1000)])
def test_linear_row_bits_do_not_depend_on_place(rng, dtype, width, depth):
    x, weight = (
        normal(rng, (1024, depth), dtype),
        cuda.to_device(normal(rng, (width, depth), dtype)),
    )
    order = rng.permutation(1024)
    out = cuda.linear(cuda.to_device(x), weight)
    moved = cuda.linear(cuda.to_device(x[order]), weight)
    assert_same_bits(moved, host(out)[order])


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


def forest(rng, rows, longest, tokens):
    """Micro-batches of random rows of 1 to `longest` tokens, most of which share a prefix."""
    token_rows: list[TokenRow] = []
    for choice in range(rows):
        token_ids = list(map(int, rng.integers(0, 99, rng.integers(2, longest + 2))))
        if token_rows and rng.random() < 0.7:
            other = token_rows[rng.integers(len(token_rows))].token_ids
            cut = rng.integers(len(other))
            token_ids = (other[:cut] + token_ids)[: longest + 1]
        token_rows.append(TokenRow(token_ids, len(token_ids) - 1, choice))
    return list(pack(token_rows, tokens, 8))


def dense_attention(qkv, batch, heads, kv_heads):
    """Row by row and head by head in float64."""
    width = qkv.shape[1] // (heads + 2 * kv_heads)
    x = wide(qkv).astype(np.float64).reshape(len(qkv), -1, width)
    out = np.empty((len(qkv), heads, width))
    for s in range(len(batch.segment_start) - 1):
        first, last = batch.segment_start[s : s + 2]
        row = x[batch.key_index[batch.key_start[s] : batch.key_start[s + 1]]]
        n, k = last - first, len(row)
        unseen = np.arange(k) > np.arange(k - n, k)[:, None]
        for head in range(heads):
            kv_head = heads + head // (heads // kv_heads)
            scores = x[first:last, head] @ row[:, kv_head].T / np.sqrt(width)
            scores = np.where(unseen, -np.inf, scores)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[first:last, head] = weights @ row[:, kv_head + kv_heads]
    return out.reshape(len(qkv), -1)


def attentions(dtype):
    """Both kernels, where the device and the storage allow."""
    yield cuda.attention_portable
    if int(cupy.cuda.Device().compute_capability) >= 80 and dtype.itemsize == 2:
        yield cuda.attention_mma


# Query and key heads for each head size.
HEADS = {
    **{32: (4, 4), 62: (2, 1), 64: (8, 2), 80: (3, 1), 96: (2, 2), 100: (4, 4)},
    **{128: (8, 2), 130: (2, 2), 192: (2, 1), 196: (4, 2), 254: (3, 1), 256: (3, 3)},
}
FORESTS = [(1, 1, 16), (3, 5, 64), (40, 170, 2048), (9, 700, 2048)]


@every_dtype
@pytest.mark.parametrize("head_dim", list(HEADS))
@pytest.mark.parametrize("rows, longest, tokens", FORESTS)
def test_attention(rng, dtype, head_dim, rows, longest, tokens):
    heads, kv_heads = HEADS[head_dim]
    for batch in forest(rng, rows, longest, tokens)[:2]:
        qkv = normal(rng, (tokens, (heads + 2 * kv_heads) * head_dim), dtype)
        expected = dense_attention(qkv, batch, heads, kv_heads)
        for attention in attentions(dtype):
            out = attention(cuda.to_device(qkv), cuda.upload(batch), None, None, heads, kv_heads)
            assert_close(out, expected)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_over_long_rows(rng, dtype, head_dim):
    long_row = TokenRow(list(map(int, rng.integers(0, 99, 3301))), 3300, 0)
    tail = TokenRow(long_row.token_ids[:3200] + [100] * 90, 3289, 1)
    (batch,) = pack([long_row, tail], 3500, 8)
    qkv = normal(rng, (3500, 4 * head_dim), dtype, 2)  # sharp softmax: the peak moves
    expected = dense_attention(qkv, batch, 2, 1)
    for attention in attentions(dtype):
        out = attention(cuda.to_device(qkv), cuda.upload(batch), None, None, 2, 1)
        assert_close(out, expected)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 100, 128, 190, 196, 254, 256])
def test_attention_row_bits_do_not_depend_on_company(rng, dtype, head_dim):
    heads, kv_heads = 4, 2
    batch = forest(rng, 30, 200, 2048)[0]
    qkv = normal(rng, (2048, (heads + 2 * kv_heads) * head_dim), dtype)
    for attention in attentions(dtype):
        together = attention(cuda.to_device(qkv), cuda.upload(batch), None, None, heads, kv_heads)
        together = host(together)
        for s in range(len(batch.segment_start) - 1):
            first, last = batch.segment_start[s : s + 2]
            places = batch.key_index[batch.key_start[s] : batch.key_start[s + 1]]
            row = TokenRow(list(range(len(places) + 1)), 1, 0)
            (lonely,) = pack([row], len(places), 1)
            own = cuda.to_device(qkv[places])
            alone = host(attention(own, cuda.upload(lonely), None, None, heads, kv_heads))
            assert_same_bits(alone[len(places) - (last - first) :], together[first:last])


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_over_many_tiles(rng, heads):
    """More segments than a grid has rows; each is one token, which sees its own value alone."""
    (batch,) = pack([TokenRow([i, 0], 1, i) for i in range(70_000)], 70_000, 1)
    qkv = normal(rng, (70_000, 3 * heads * 32), np.float16)
    for attention in attentions(qkv.dtype):
        out = attention(cuda.to_device(qkv), cuda.upload(batch), None, None, heads, heads)
        # equal, but not in the sign of a zero: -0 added to what a tile has of zeros is 0
        np.testing.assert_array_equal(host(out), qkv[:, 2 * heads * 32 :])


def test_attention_ignores_other_segments(rng):
    """NaN in one row stays in that row."""
    rows = [TokenRow([first] + list(range(100)), 1, first) for first in range(3)]
    (batch,) = pack(rows, 300, 1)
    qkv = normal(rng, (300, 4 * 64), np.float16)
    qkv[100:200] = np.nan
    for attention in attentions(qkv.dtype):
        out = host(attention(cuda.to_device(qkv), cuda.upload(batch), None, None, 2, 1))
        assert np.isfinite(out[:100]).all() and np.isfinite(out[200:]).all()
        assert np.isnan(out[100:200]).all()


def test_upload(rng):
    batch = forest(rng, 30, 100, 1024)[0]
    uploaded = [cuda.upload(batch) for _ in range(20)]
    for device in uploaded:
        for name, array in vars(batch).items():
            np.testing.assert_array_equal(host(getattr(device, name)), array)
    tiles = host(uploaded[0].tiles)
    covered = np.zeros(1024, int)
    for segment, first in tiles:
        begin, end = batch.segment_start[segment : segment + 2]
        covered[begin + first : min(begin + first + cuda.QUERY_TILE, end)] += 1
    assert (covered == 1).all()


def test_bad_arrays_are_refused():
    x = cupy.zeros((4, 64), cupy.float16)
    with pytest.raises(AssertionError, match="float32"):
        cuda.rmsnorm(x, cupy.zeros(64, cupy.float32), 1e-6)
    with pytest.raises(AssertionError, match="strides"):
        cuda.swiglu(cupy.zeros((64, 4), cupy.float16).T)
    with pytest.raises(AssertionError, match="instead of"):
        cuda.rmsnorm(x, cupy.zeros(63, cupy.float16), 1e-6)
