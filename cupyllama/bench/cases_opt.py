"""The kernels that only OPT has, as a bench sees them."""

from functools import partial
from typing import Any

from cupyllama.bench.cases import (
    Case,
    Setting,
    Work,
    check_rows,
    host,
    linear_work,
    some_rows,
    written,
)
from cupyllama.bench.measure import check
from cupyllama.model.opt import LAYER_NORM_EPS
from cupyllama.ops import reference


def layernorm_work(tokens: int, hidden: int, itemsize: int, quantized: bool = False) -> Work:
    """A row read and written, weight and bias read.

    A sum, a difference, a square, a sum, two products and a sum an element.
    """
    read, flops = (tokens + 2) * hidden * itemsize, 7 * tokens * hidden
    return written(Work(read, flops), tokens, hidden, itemsize, quantized)


def layernorm(setting: Setting, quantized: bool = False) -> Case:
    name, hidden = "layernorm, fp8" if quantized else "layernorm", setting.config.hidden_size
    x = setting.values(setting.tokens, hidden)
    norm = setting.values(hidden, seed=2), setting.values(hidden, seed=3)
    launch = partial(setting.ops.layernorm, x, *norm, LAYER_NORM_EPS, quantized)

    def checked() -> None:
        some = some_rows(setting.tokens)
        weights = [host(array) for array in norm]
        expected = reference.layernorm(host(x[some]), *weights, LAYER_NORM_EPS, quantized)
        check_rows(name, launch(), some, expected, setting.dtype)

    work = layernorm_work(setting.tokens, hidden, x.itemsize, quantized)
    return Case(name, launch, checked, work)


def add_work(tokens: int, hidden: int, itemsize: int) -> Work:
    """Two rows read and one written; a sum an element."""
    return Work(3 * tokens * hidden * itemsize, tokens * hidden)


def add(setting: Setting) -> Case:
    hidden = setting.config.hidden_size
    x, y = setting.values(setting.tokens, hidden), setting.values(setting.tokens, hidden, seed=2)
    launch = partial(setting.ops.add, x, y)

    def checked() -> None:
        some = some_rows(setting.tokens)
        expected = reference.add(host(x[some]), host(y[some]))  # before it is done in place
        check("add", launch()[some], expected, setting.dtype)

    return Case("add", launch, checked, add_work(setting.tokens, hidden, x.itemsize))


def linear(setting: Setting) -> Case:
    """The last product of a layer, with its bias and on top of the residual stream."""
    config, tokens = setting.config, setting.tokens
    n, k = config.hidden_size, config.ffn_dim
    x, weight, bias = _product(setting, n, k)
    residual = setting.values(tokens, n, seed=4)

    def launch() -> Any:
        return setting.ops.linear(x, weight, bias, residual)

    def checked() -> None:
        some = some_rows(tokens)
        before = host(residual[some])  # summed up in place
        expected = reference.linear(host(x[some]), host(weight), host(bias), before)
        check("linear", launch()[some], expected, setting.dtype)

    product = linear_work(tokens, n, k, n, x.itemsize)
    work = Work(product.nbytes + (tokens + 1) * n * x.itemsize, product.flops)
    return Case("linear", launch, checked, work, on_matrix_units=True)


def linear_relu(setting: Setting) -> Case:
    """The product before, with its bias and ReLU."""
    config, tokens = setting.config, setting.tokens
    n, k = config.ffn_dim, config.hidden_size
    operands = _product(setting, n, k)
    launch = partial(setting.ops.linear_relu, *operands)

    def checked() -> None:
        some = some_rows(tokens)
        x, weight, bias = operands
        expected = reference.linear_relu(host(x[some]), host(weight), host(bias))
        check("linear_relu", launch()[some], expected, setting.dtype)

    product = linear_work(tokens, n, k, n, setting.dtype.itemsize)
    work = Work(product.nbytes + n * setting.dtype.itemsize, product.flops)
    return Case("linear_relu", launch, checked, work, on_matrix_units=True)


def _product(setting: Setting, n: int, k: int) -> tuple[Any, Any, Any]:
    """x, weight and bias, such that the product and the bias are as large."""
    x = setting.values(setting.tokens, k)
    weight = setting.values(n, k, seed=2, deviation=k**-0.5)
    return x, weight, setting.values(n, seed=3)
