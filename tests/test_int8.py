"""int8 weights: how near they are, what products make of them, and the demo scored with them."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from engine import score_rows
from test_evaluate import random_rows
from tiny_models import write_tiny_model

from cupyllama.checkpoint.eight_bit import quantize_rows
from cupyllama.checkpoint.fields import matrix_shapes
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.cli import cli
from cupyllama.config import load_config
from cupyllama.evaluate import plan
from cupyllama.families import family_of
from cupyllama.loading import load_stage
from cupyllama.ops import reference
from cupyllama.quantized import Quantized, quantizes_activations
from cupyllama.sizing import activation_bytes, micro_batch_tokens

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BF16]
ROWS = random_rows(np.random.default_rng(6), 12)
MODELS = ["gqa", "odd", "attention_bias", "opt", "opt_350m", "opt_untied"]

# The quotient has two roundings of float32 before its own: 127 · 2 · 2⁻²⁴ of a step.
HALF_A_STEP = 0.5 + 2.0**-16

every_way = pytest.mark.parametrize("quantize", [reference.quantize, quantize_rows])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)


def int8(x):
    return reference.quantize(x, kind="int8")


# --- the numbers ---------------------------------------------------------------------------------


def awkward_rows(rng, rows, columns, dtype):
    """Rows of all sizes; zeros, one number alone, the largest and the least, signs of one kind."""
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-7, 4, (rows, 1))
    x[rng.random(x.shape) < 0.05] = 0
    for row, value in enumerate([0.0, -0.0, -60000.0, 6e-8, -1e-38, 1e-41][:rows]):
        x[row] = np.where(rng.random(columns) < 0.5, value, 0)
    if rows > 8:
        x[6], x[7], x[8] = -np.abs(x[6]), x[7] * 1e-36, np.arange(columns) - columns // 2
    return x.astype(dtype)


@every_way
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (3, 331), (40, 127), (11, 4096), (0, 5), (5, 0)])
def test_every_weight_is_within_half_a_step(shape, dtype, quantize):
    rng = np.random.default_rng(shape)
    for _ in range(5):
        x = awkward_rows(rng, *shape, dtype)
        matrix = quantize(x, kind="int8")
        assert matrix.kind == "int8" and matrix.values.dtype == np.int8
        step = matrix.scale.astype(np.float64)[:, None]
        assert (step > 0).all() and np.abs(matrix.values.astype(int)).max(initial=0) <= 127
        wide = x.astype(np.float64)
        assert (np.abs(matrix.values * step - wide) <= HALF_A_STEP * step).all()
        peak = np.abs(wide).max(axis=1, initial=0)
        large = peak > 127 * 2.0**-126
        assert (np.abs(matrix.values[large].astype(int)).max(axis=1, initial=0) == 127).all()
        np.testing.assert_allclose(matrix.scale[large], peak[large] / 127, rtol=1e-7)
        assert (matrix.scale[~large] == 1).all() and not matrix.values[~large].any()


@every_way
def test_halves_go_to_the_even_number(quantize):
    row = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 125.5, -127]], np.float32)
    matrix = quantize(row, kind="int8")
    assert matrix.scale == [1]
    assert matrix.values.tolist() == [[127, 0, 2, 2, 0, -2, 126, 126, -127]]


@every_way
@every_dtype
def test_a_number_that_int8_has_not_breaks_its_row_and_no_other(dtype, quantize):
    x = np.ones((5, 70), dtype)
    x[1, 3], x[2, 0], x[3, 69], x[3, 1] = np.nan, np.inf, -np.inf, np.nan
    with np.errstate(all="raise", under="ignore"):
        matrix = quantize(x, kind="int8")
    assert matrix.scale.tolist() == pytest.approx([1 / 127, np.inf, np.inf, np.inf, 1 / 127])
    assert not matrix.values[1:4].any()
    given = np.full((4, 70), 2, np.float32)
    product = reference.linear(given, matrix)
    np.testing.assert_array_equal(np.isnan(product), [[False, True, True, True, False]] * 4)


def test_dequantizing_rounds_once_more():
    matrix = int8(np.random.default_rng(0).standard_normal((30, 77)) * 3)
    wide = matrix.values.astype(np.float32) * matrix.scale[:, None]
    for dtype in DTYPES:
        found = reference.dequantize(matrix, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wide.astype(dtype))


def test_out_shows_the_kind():
    x = np.random.default_rng(1).standard_normal((4, 9)).astype(np.float32)
    for quantize in (reference.quantize, quantize_rows):
        out = Quantized(np.empty((4, 9), np.int8), np.empty(4, np.float32))
        quantize(x, out)
        np.testing.assert_array_equal(out.values, int8(x).values)
        assert quantize(x).kind == "fp8"


# --- products ------------------------------------------------------------------------------------


@every_dtype
def test_a_product_is_that_of_the_array(dtype):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((150, 61)).astype(dtype)
    matrix = int8(rng.standard_normal((46, 61)))
    array = reference.dequantize(matrix, dtype)
    bias, residual = (rng.standard_normal(s).astype(dtype) for s in (46, (150, 46)))
    for extra in ((), (bias,), (bias, residual), (None, residual), (None, None, np.float32)):
        found, expected = (reference.linear(x, weight, *extra) for weight in (matrix, array))
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    exact = x.astype(np.float64) @ (matrix.values * matrix.scale[:, None].astype(np.float64)).T
    error = np.linalg.norm(reference.linear(x, matrix).astype(np.float64) - exact)
    assert error < {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype.name] * (
        np.linalg.norm(exact)
    )


def test_what_activations_are():
    matrix = np.ones((2, 3), np.float32)
    assert quantizes_activations(reference.quantize(matrix))
    assert not quantizes_activations(int8(matrix)) and not quantizes_activations(matrix)


def stage(directory, layers=None, quantize="int8", dtype=np.float32, change=lambda layer: layer):
    config = load_config(directory)
    layers = range(config.num_hidden_layers) if layers is None else layers
    weights = load_stage(
        *(open_checkpoint(directory), config, layers, np.dtype(dtype), reference), quantize=quantize
    )
    weights = replace(weights, layers=[change(layer) for layer in weights.layers])
    return family_of(config).model.Stage(config, weights, reference, config.max_length)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_that_of_the_arrays(name, dtype, tmp_path):
    """So it quantizes the matrices of the layers, and nothing else: no activation."""
    directory, matrices = write_tiny_model(name, tmp_path), set()

    def as_arrays(layer):
        quantized = {n: v for n, v in vars(layer).items() if isinstance(v, Quantized)}
        matrices.update(quantized)
        arrays = {n: reference.dequantize(v, dtype) for n, v in quantized.items()}
        return replace(layer, **arrays)

    found, expected, plain = (
        score_rows(made, ROWS).loglikelihoods
        for made in (
            stage(directory, dtype=dtype),
            stage(directory, dtype=dtype, change=as_arrays),
            stage(directory, dtype=dtype, quantize=None),
        )
    )
    assert matrices == set(matrix_shapes(load_config(directory)))
    np.testing.assert_array_equal(found, expected)
    assert 1e-4 < np.abs(found - plain).mean() < 0.2  # of sums of log-probabilities around -50


@pytest.mark.parametrize("name", ["gqa", "odd"])
def test_stages_pass_on_the_same_bits(name, tmp_path):
    directory = write_tiny_model(name, tmp_path)
    layers = load_config(directory).num_hidden_layers
    batch = plan(ROWS, 4000, reference)[0]
    expected = stage(directory).forward(batch)
    for stages in range(2, layers + 1):
        edges = [layers * i // stages for i in range(stages + 1)]
        hidden = None
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            hidden = stage(directory, range(first, last)).forward(batch, hidden)
        np.testing.assert_array_equal(hidden, expected)


def test_a_broken_weight_is_seen(tmp_path):
    directory = write_tiny_model("gqa", tmp_path)

    def broken(layer):
        layer.o_proj.scale[3] = int8(np.array([[1, np.nan]])).scale[0]
        return layer

    assert np.isnan(score_rows(stage(directory, change=broken), ROWS).loglikelihoods).all()


# --- memory --------------------------------------------------------------------------------------


def test_the_array_of_the_largest_matrix_is_counted(tmp_path):
    config = load_config(write_tiny_model("gqa", tmp_path))
    for dtype, itemsize in (("float16", 2), ("float32", 4)):
        plain, found = (activation_bytes(config, 300, dtype, 10, kind) for kind in (None, "int8"))
        assert found - plain == 768 * 128 * itemsize  # q k v of 64 · (8 + 2 + 2) rows
    enough = int(activation_bytes(config, 512, "float16", 10) / 0.9) + 9
    for kind, size in ((None, 512), ("int8", 256)):
        assert micro_batch_tokens(None, 9, config, "float16", 10, enough, kind) == size


# --- the command line ----------------------------------------------------------------------------


def test_the_demo_is_answered_as_well(tmp_path):
    def score(*arguments):
        fixed = ["score", "--demo", "--device", "cpu", "--quiet"]
        result = CliRunner().invoke(cli, [*fixed, *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    score("--samples", tmp_path / "plain")
    told = score("--quantize", "int8", "--compare", tmp_path / "plain")
    lines = {line.split()[0]: line.split() for line in told.splitlines()[-6:] if line.strip()}
    for name in ("acc", "acc_norm"):
        before, after = map(float, lines[name][1:3])
        assert before > 95 and abs(before - after) <= 1
    assert "log-likelihoods of 1,600 choices: changed by" in told
    assert "changed by +0.000000" not in told
