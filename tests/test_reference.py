"""The reference operations against the formulas of their papers, in float64, a token at a time.

Sizes are odd on purpose, and reach over the pieces that the work is cut into.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from cupyllama.ops import reference
from cupyllama.packing import TokenRow, pack
from cupyllama.quantized import Quantized

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
# What one rounding of the result costs, and for float32 the sums too.
TOLERANCE = {np.float32: 2e-5, np.float16: 2**-10, ml_dtypes.bfloat16: 2**-7}


@pytest.fixture
def rng():
    rng = np.random.default_rng()
    print("seed", rng.bit_generator.seed_seq.entropy)
    return rng


def random(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def assert_equal(found, expected, dtype=np.float32):
    """Within what is due to rounding, of values that are around 1."""
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=tolerance, atol=tolerance)


# Every e4m3 number but NaN, by its definition: exponents of 4 bits, biased by 7, and 3 of mantissa.
E4M3 = {
    bits: (-1) ** (bits >> 7)
    * (
        2.0 ** ((bits >> 3 & 15) - 7) * (1 + (bits & 7) / 8)
        if bits >> 3 & 15
        else (bits & 7) * 2**-9
    )
    for bits in range(256)
    if bits & 127 != 127
}


def assert_close_to_quantized(found, expected):
    """Each row has a scale by which its largest number is 448; each number is the nearest e4m3."""
    assert found.values.dtype == np.uint8 and found.scale.dtype == np.float32
    table = np.array([E4M3.get(bits, np.nan) for bits in range(256)])
    numbers = np.array(sorted(E4M3.values()))
    peak = np.abs(expected).max(axis=1)
    scale = np.where(peak > 0, peak / 448, 1)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-5)
    wanted = expected / found.scale.astype(float)[:, None]
    nearest = np.abs(wanted[..., None] - numbers).min(axis=-1)
    error = np.abs(table[found.values] - wanted)
    assert (error <= nearest + 1e-4 * np.abs(wanted)).all()  # a tie may fall to either side


def assert_same_bits(found, expected):
    """Two quantized matrices."""
    assert found.values.tobytes() == expected.values.tobytes()
    assert found.scale.tobytes() == expected.scale.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 33), (5, 128), (2, 1000)])
def test_quantize(rng, rows, columns, dtype):
    x = (random(rng, rows, columns) * 10.0 ** rng.integers(-3, 3, (rows, 1))).astype(dtype)
    x[-1] = 0
    found = reference.quantize(x)
    assert_close_to_quantized(found, x.astype(float))
    out = Quantized(np.empty((rows, columns), np.uint8), np.empty(rows, np.float32))
    assert reference.quantize(x, out) is out
    np.testing.assert_array_equal(out.values, found.values)
    np.testing.assert_array_equal(reference.dequantize(out), reference.dequantize(found))


def test_quantize_rounds_to_even_and_reaches_subnormals():
    # 448 makes the scale 1.  Halfway between neighbours, e4m3 takes the one with the even mantissa.
    x = np.array([[448, 17, 19, -17, 2**-9, 2**-10, 3 * 2**-10, 440, 0]], np.float32)
    found = reference.dequantize(reference.quantize(x))
    assert found.tolist() == [[448, 16, 20, -16, 2**-9, 0, 2**-8, 448, 0]]


def test_quantize_keeps_what_is_no_number():
    x = np.array([[1, np.nan, -2], [1, np.inf, 2], [3, 1e-40, 0], [1e-40, 0, 0]], np.float32)
    found = reference.dequantize(reference.quantize(x))
    np.testing.assert_array_equal(np.isnan(found[0]), [False, True, False])
    assert np.isnan(found[1]).all()
    assert found[2].tolist() == [3, 0, 0] and found[3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("tokens", "columns", "rows"), [(1, 16, 32), (129, 64, 31)])
def test_linear_quantized(rng, tokens, columns, rows, with_residual):
    x, weight = random(rng, tokens, columns), reference.quantize(random(rng, rows, columns))
    residual = random(rng, tokens, rows) if with_residual else None
    rounded = reference.quantize(x)
    expected = reference.dequantize(rounded).astype(float) @ reference.dequantize(weight).T
    expected += residual if with_residual else 0
    assert_equal(reference.linear(x, weight, residual=residual) / 8, expected / 8)
    assert_equal(reference.linear(rounded, weight, None, residual, np.float32) / 8, expected / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocab", "hidden"), [(1, 3, 5), (7, 11, 33), (131, 2, 64)])
def test_gather(rng, tokens, vocab, hidden, dtype):
    weight = random(rng, vocab, hidden, dtype=dtype)
    ids = rng.integers(0, vocab, tokens).astype(np.int32)
    found = reference.gather(ids, weight)
    for token in range(tokens):
        np.testing.assert_array_equal(found[token], weight[int(ids[token])])
    negative = np.array([-1, vocab - 1, -vocab - 1], np.int32)
    np.testing.assert_array_equal(reference.gather(negative, weight), weight[[0, vocab - 1, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (1, 33), (7, 96), (130, 257)])
def test_rmsnorm(rng, tokens, hidden, dtype):
    # small values: eps is not lost beside the mean square
    x = (0.01 * random(rng, tokens, hidden)).astype(dtype)
    weight = random(rng, hidden, dtype=dtype)
    eps = 1e-4
    expected = np.empty((tokens, hidden))
    for token in range(tokens):
        values = [float(value) for value in x[token]]
        root = math.sqrt(math.fsum(value * value for value in values) / hidden + eps)
        expected[token] = [v / root * float(w) for v, w in zip(values, weight, strict=True)]
    assert_equal(reference.rmsnorm(x, weight, eps), expected, dtype)
    assert_close_to_quantized(reference.rmsnorm(x, weight, eps, quantized=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (1, 33), (7, 96), (130, 257)])
@pytest.mark.parametrize(("mean", "spread"), [(0, 0.01), (3, 1)])
def test_layernorm(rng, tokens, hidden, mean, spread, dtype):
    # at the small spread, eps is not lost beside the variance
    x = (mean + spread * random(rng, tokens, hidden)).astype(dtype)
    weight, bias = random(rng, hidden, dtype=dtype), random(rng, hidden, dtype=dtype)
    eps = 1e-4
    expected = np.empty((tokens, hidden))
    for token in range(tokens):
        values = [float(value) for value in x[token]]
        middle = math.fsum(values) / hidden
        root = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / hidden + eps)
        expected[token] = [(value - middle) / root for value in values]
    expected = expected * weight.astype(float) + bias.astype(float)
    assert_equal(reference.layernorm(x, weight, bias, eps), expected, dtype)
    wide = (array.astype(np.float32) for array in (x, weight, bias))
    assert_same_bits(
        reference.layernorm(x, weight, bias, eps, quantized=True),
        reference.quantize(reference.layernorm(*wide, eps)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "columns", "rows"),
    [(1, 1, 1), (1, 33, 7), (127, 5, 3), (128, 65, 9), (129, 64, 31), (300, 7, 130)],
)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear(rng, tokens, columns, rows, with_bias, with_residual, dtype):
    x = random(rng, tokens, columns, dtype=dtype)
    weight = (random(rng, rows, columns) / math.sqrt(columns)).astype(dtype)
    bias = random(rng, rows, dtype=dtype) if with_bias else None
    residual = random(rng, tokens, rows, dtype=dtype) if with_residual else None
    expected = np.einsum("ti,oi->to", x.astype(float), weight.astype(float))
    if with_bias:
        expected += bias.astype(float)
    if with_residual:
        expected += residual.astype(float)
    wide = reference.linear(
        x, weight, bias, None if residual is None else residual.copy(), np.float32
    )
    assert_equal(wide, expected)
    assert_equal(reference.linear(x, weight, bias, residual), expected, dtype)


HEADS = [  # heads, key-value heads, head_dim
    (1, 1, 32),
    (3, 1, 34),
    (4, 2, 64),
    (6, 3, 100),
    (5, 5, 128),
    (8, 1, 256),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("tokens", [1, 13])
def test_rope(rng, heads, kv_heads, head_dim, tokens, dtype):
    qkv = random(rng, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    positions = rng.integers(0, 50, tokens).astype(np.int32)
    half = head_dim // 2
    angles = np.arange(50)[:, None] * 10000.0 ** -(np.arange(half) / half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    expected = qkv.astype(float)
    for token in range(tokens):
        for head in range(heads + kv_heads):  # the values are left alone
            for i in range(half):
                first, second = head * head_dim + i, head * head_dim + i + half
                turn = complex(math.cos(angles[positions[token], i]), 0)
                turn += 1j * math.sin(angles[positions[token], i])
                pair = complex(float(qkv[token, first]), float(qkv[token, second])) * turn
                expected[token, first], expected[token, second] = pair.real, pair.imag
    values = qkv[:, (heads + kv_heads) * head_dim :].copy()
    found = reference.rope(qkv, positions, cos, sin, heads, kv_heads)
    assert found is qkv
    assert_equal(found, expected, dtype)
    np.testing.assert_array_equal(found[:, (heads + kv_heads) * head_dim :], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS[:3])
def test_products_with_what_follows(rng, heads, kv_heads, head_dim, dtype):
    """As their two parts in float32, and rounded once."""
    x, width = random(rng, 13, 33, dtype=dtype), (heads + 2 * kv_heads) * head_dim
    weight, bias = random(rng, width, 33, dtype=dtype), random(rng, width, dtype=dtype)
    positions = rng.integers(0, 50, 13).astype(np.int32)
    cos, sin = random(rng, 50, head_dim // 2), random(rng, 50, head_dim // 2)
    product = x.astype(np.float32) @ weight.astype(np.float32).T
    turn = (positions, cos, sin, heads, kv_heads)
    turned = reference.rope(product + bias.astype(np.float32), *turn)
    assert_equal(reference.linear_rope(x, weight, bias, *turn) / 8, turned / 8, dtype)
    gated = reference.swiglu(product)
    assert_equal(reference.linear_swiglu(x, weight) / 32, gated / 32, dtype)
    assert_close_to_quantized(reference.linear_swiglu(x, weight, quantized=True), gated)
    eight_bit = reference.quantize(x), reference.quantize(weight)
    wide = reference.linear(*eight_bit, out_dtype=np.float32)
    found = reference.linear_swiglu(*eight_bit, out_dtype=dtype)
    assert_equal(found / 32, reference.swiglu(wide) / 32, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "columns", "rows"), [(1, 1, 1), (7, 33, 9), (129, 64, 31), (3, 16, 130)]
)
def test_linear_relu(rng, tokens, columns, rows, dtype):
    x = random(rng, tokens, columns, dtype=dtype)
    weight = (random(rng, rows, columns) / math.sqrt(columns)).astype(dtype)
    bias = random(rng, rows, dtype=dtype)
    bias[-1] = -100  # never above 0
    product = np.einsum("ti,oi->to", x.astype(float), weight.astype(float)) + bias.astype(float)
    expected = np.where(product > 0, product, 0)
    assert_equal(reference.linear_relu(x, weight, bias), expected, dtype)
    wide = (array.astype(np.float32) for array in (x, weight, bias))
    assert_same_bits(
        reference.linear_relu(x, weight, bias, quantized=True),
        reference.quantize(reference.linear_relu(*wide)),
    )
    eight_bit = reference.quantize(x), reference.quantize(weight)
    rounded = (reference.dequantize(matrix).astype(float) for matrix in eight_bit)
    product = np.einsum("ti,oi->to", *rounded) + bias.astype(float)
    found = reference.linear_relu(*eight_bit, bias, out_dtype=dtype)
    assert_equal(found, np.where(product > 0, product, 0), dtype)


def test_relu_keeps_what_is_no_number():
    x = np.array([[np.nan, 1.0], [np.inf, 1.0], [-1.0, 1.0]], np.float32)
    found = reference.linear_relu(x, np.ones((1, 2), np.float32), np.zeros(1, np.float32))
    np.testing.assert_array_equal(found, [[np.nan], [np.inf], [0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (7, 33), (130, 257)])
def test_add(rng, tokens, hidden, dtype):
    x, y = random(rng, tokens, hidden, dtype=dtype), random(rng, tokens, hidden, dtype=dtype)
    expected = x.astype(float) + y.astype(float)
    assert_equal(reference.add(x, y), expected, dtype)


def packed_rows(rng):
    """Rows that share prefixes, of 1 to 40 tokens fed."""
    rows = []
    for _ in range(4):
        context = rng.integers(0, 5, rng.integers(1, 30)).tolist()
        for _ in range(3):
            ending = rng.integers(0, 5, rng.integers(1, 12)).tolist()
            rows.append(TokenRow(context + ending, len(context), len(rows)))
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiple", [1, 512])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention(rng, heads, kv_heads, head_dim, multiple, dtype):
    (batch,) = pack(packed_rows(rng), 512, multiple)
    tokens = len(batch.token_ids)
    qkv = random(rng, tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    found = reference.attention(qkv, batch, heads, kv_heads)
    assert found.shape == (tokens, heads * head_dim)
    wide = qkv.astype(float).reshape(tokens, heads + 2 * kv_heads, head_dim)
    expected = np.empty((tokens, heads, head_dim))
    for segment in range(len(batch.segment_start) - 1):
        first, last = (int(at) for at in batch.segment_start[segment : segment + 2])
        places = batch.key_index[batch.key_start[segment] : batch.key_start[segment + 1]]
        for i in range(last - first):
            seen = places[: len(places) - (last - first) + i + 1]
            for head in range(heads):
                shared = head // (heads // kv_heads)  # neighbouring heads share keys and values
                keys, values = wide[seen, heads + shared], wide[seen, heads + kv_heads + shared]
                scores = keys @ wide[first + i, head] / math.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                expected[first + i, head] = weights @ values / weights.sum()
    assert_equal(found, expected.reshape(tokens, -1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1), (7, 33), (130, 137)])
def test_swiglu(rng, tokens, inner, dtype):
    gate_up = random(rng, tokens, 2 * inner, dtype=dtype)
    gate_up[0, 0] = -1000  # exp(1000) is infinite, and silu(-1000) is 0
    gate_up[-1, inner - 1] = 100
    expected = np.empty((tokens, inner))
    for token in range(tokens):
        for i in range(inner):
            gate, up = float(gate_up[token, i]), float(gate_up[token, inner + i])
            sigmoid = 1 / (1 + math.exp(-gate)) if gate > -700 else 0.0
            expected[token, i] = gate * sigmoid * up
    assert_equal(reference.swiglu(gate_up), expected, dtype)
    assert_close_to_quantized(reference.swiglu(gate_up, quantized=True), expected)


def log_probs(logits, targets):
    """`targets`: a list of tokens for each row. Returns log-probabilities and greedy flags."""
    start = np.concatenate([[0], np.cumsum([len(row) for row in targets])]).astype(np.int32)
    token = np.array([token for row in targets for token in row], np.int32)
    out = np.full((2, len(token)), 7, np.float32)
    reference.log_probs(np.asarray(logits, np.float32), start, token, out)
    return out


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (5, 331), (67, 1000)])
def test_log_probs(rng, rows, vocab):
    logits = 5 * random(rng, rows, vocab)
    logits[0] += 1e4  # whose exponential is infinite
    targets = [rng.integers(0, vocab, rng.integers(0, 4)).tolist() for _ in range(rows)]
    targets[-1] = [int(logits[-1].argmax()), 0]
    out = log_probs(logits, targets)
    expected = []
    for row, tokens in zip(logits.astype(float), targets, strict=True):
        log_sum = row.max() + math.log(math.fsum(np.exp(row - row.max())))
        likely = max(range(vocab), key=lambda token, row=row: row[token])  # the first of equals
        expected += [(row[token] - log_sum, token == likely) for token in tokens]
    # float32 holds 10,000 to 1e-3
    atol = np.repeat([2e-3, *[2e-5] * (rows - 1)], [len(row) for row in targets])
    assert (np.abs(out[0] - [value for value, _ in expected]) <= atol).all()
    assert out[1].tolist() == [flag for _, flag in expected]


def test_the_lowest_token_wins_a_tie():
    out = log_probs([[1.0, 3.0, 3.0, 0.0]], [[2, 1, 1, 0]])
    assert out[1].tolist() == [0, 1, 1, 0]
    assert out[0, 0] == out[0, 1]


def test_a_logit_that_is_no_number_reaches_every_target_of_its_row_and_no_other():
    logits = [[0.0, 1.0, 2.0], [0.0, math.nan, 2.0], [2.0, 1.0, 0.0]]
    out = log_probs(logits, [[0, 2], [0, 1, 2], [1]])
    assert np.isnan(out[0]).tolist() == [False, False, True, True, True, False]
    assert out[1, 1] == 1 and out[1, 5] == 0


def test_targets_of_other_rows_are_not_touched():
    """A chunk of the logits writes its own columns alone."""
    out = np.full((2, 6), 7, np.float32)
    start, token = np.array([2, 3, 5], np.int32), np.array([9, 9, 0, 1, 0, 9], np.int32)
    reference.log_probs(np.zeros((2, 2), np.float32), start, token, out)
    np.testing.assert_allclose(out[0], [7, 7, *[-math.log(2)] * 3, 7], rtol=1e-6)
    assert out[1].tolist() == [7, 7, 1, 0, 1, 7]
