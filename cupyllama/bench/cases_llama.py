"""The kernels that only LLaMA's family has, as a bench sees them."""

from functools import partial

from cupyllama.bench.cases import (
    INDEX_BYTES,
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
from cupyllama.model.rope import rope_tables
from cupyllama.ops import reference


def rmsnorm_work(tokens: int, hidden: int, itemsize: int, quantized: bool = False) -> Work:
    """A row read and written, the weight read; a square, a sum and two products an element."""
    read, flops = (tokens + 1) * hidden * itemsize, 4 * tokens * hidden
    return written(Work(read, flops), tokens, hidden, itemsize, quantized)


def rmsnorm(setting: Setting, quantized: bool = False) -> Case:
    name = "rmsnorm, fp8" if quantized else "rmsnorm"
    hidden, eps = setting.config.hidden_size, setting.config.rms_norm_eps
    x, weight = setting.values(setting.tokens, hidden), setting.values(hidden, seed=2)
    launch = partial(setting.ops.rmsnorm, x, weight, eps, quantized)

    def checked() -> None:
        some = some_rows(setting.tokens)
        expected = reference.rmsnorm(host(x[some]), host(weight), eps, quantized)
        check_rows(name, launch(), some, expected, setting.dtype)

    work = rmsnorm_work(setting.tokens, hidden, x.itemsize, quantized)
    return Case(name, launch, checked, work)


def rope_work(tokens: int, rotated: int, itemsize: int) -> Work:
    """The `rotated` elements of q and k read and written, a position read; tables stay in a cache.

    Four products and two sums turn two elements.
    """
    return Work(tokens * (INDEX_BYTES + 2 * rotated * itemsize), 3 * tokens * rotated)


def rope(setting: Setting) -> Case:
    ops, config = setting.ops, setting.config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    qkv = setting.values(setting.tokens, config.qkv_size)
    positions = setting.batch.positions
    tables = rope_tables(config, int(positions.max()) + 1)
    on_device = [ops.to_device(array) for array in (positions, *tables)]
    launch = partial(ops.rope, qkv, *on_device, *heads)

    def checked() -> None:
        some = some_rows(setting.tokens)
        before = host(qkv[some])  # rotated in place
        expected = reference.rope(before, positions[some], *tables, *heads)
        check("rope", launch()[some], expected, setting.dtype)

    work = rope_work(setting.tokens, config.q_size + config.kv_size, qkv.itemsize)
    return Case("rope", launch, checked, work)


def swiglu_work(tokens: int, intermediate: int, itemsize: int, quantized: bool = False) -> Work:
    """gate and up read, their mix written; an exponential, a sum, a quotient and a product."""
    read, flops = 2 * tokens * intermediate * itemsize, 4 * tokens * intermediate
    return written(Work(read, flops), tokens, intermediate, itemsize, quantized)


def swiglu(setting: Setting, quantized: bool = False) -> Case:
    name = "swiglu, fp8" if quantized else "swiglu"
    intermediate = setting.config.intermediate_size
    gate_up = setting.values(setting.tokens, 2 * intermediate)
    launch = partial(setting.ops.swiglu, gate_up, quantized)

    def checked() -> None:
        some = some_rows(setting.tokens)
        expected = reference.swiglu(host(gate_up[some]), quantized)
        check_rows(name, launch(), some, expected, setting.dtype)

    work = swiglu_work(setting.tokens, intermediate, gate_up.itemsize, quantized)
    return Case(name, launch, checked, work)


def linear_swiglu(setting: Setting) -> Case:
    """The product with gate and up, and what SwiGLU makes of it."""
    config, tokens = setting.config, setting.tokens
    n, k = 2 * config.intermediate_size, config.hidden_size
    x = setting.values(tokens, k)
    weight = setting.values(n, k, seed=2, deviation=k**-0.5)
    launch = partial(setting.ops.linear_swiglu, x, weight)

    def checked() -> None:
        some = some_rows(tokens)
        expected = reference.linear_swiglu(host(x[some]), host(weight))
        check("linear_swiglu", launch()[some], expected, setting.dtype)

    work = linear_work(tokens, n, k, config.intermediate_size, x.itemsize)
    return Case("linear_swiglu", launch, checked, work, on_matrix_units=True)


def linear_rope(setting: Setting) -> Case:
    """The product with q, k and v, and the rotation of q and k."""
    ops, config, tokens = setting.ops, setting.config, setting.tokens
    heads = (config.num_attention_heads, config.num_key_value_heads)
    n, k = config.qkv_size, config.hidden_size
    x = setting.values(tokens, k)
    weight = setting.values(n, k, seed=2, deviation=k**-0.5)
    positions = setting.batch.positions
    tables = rope_tables(config, int(positions.max()) + 1)
    on_device = [ops.to_device(array) for array in (positions, *tables)]
    launch = partial(ops.linear_rope, x, weight, None, *on_device, *heads)

    def checked() -> None:
        some = some_rows(tokens)
        turn = (positions[some], *tables, *heads)
        expected = reference.linear_rope(host(x[some]), host(weight), None, *turn)
        check("linear_rope", launch()[some], expected, setting.dtype)

    work = linear_work(tokens, n, k, n, x.itemsize)
    return Case("linear_rope", launch, checked, work, on_matrix_units=True)
