"""Matrix products in the one form that a decoder needs."""

import cupy
import numpy as np

from cupyllama.kernels import definitions, kernel
from cupyllama.ops import cublaslt
from cupyllama.ops.arrays import check, storage
from cupyllama.quantized import Quantized

Array = cupy.ndarray


def gemm(
    y: Array,
    x: Array | Quantized,
    weight: Array | Quantized,
    accumulate: bool = False,
    bias: Array | None = None,
    relu: bool = False,
    chosen_for: int = cublaslt.NOMINAL_M,
) -> None:
    """y = x · weightᵀ + bias, or y += with `accumulate`: (m, n), (m, k), (n, k), (n,), row-major.

    Operands are float16, bfloat16 or float32, or both quantized; sums are float32 (no TF32; for
    quantized operands as the GPU's 8-bit units add, to about 14 bits within a product). y has
    the type of the operands or is float32; of quantized operands, float16, bfloat16 or float32.

    The result is rounded once, except where cuBLASLt does not add a bias of that type itself:
    a pass of its own then adds it, to a product that was rounded for that.

    Args:
        relu: max(y, 0) of the sum, which has a bias.
        chosen_for: the m that the algorithm is best for; a row's bits depend on it.

    Raises:
        CublasLtError: with status 15, sizes that 8-bit products do not allow: not multiples of 16.
    """
    (m, k), n = x.shape, len(weight)
    assert weight.shape == (n, k) and y.shape == (m, n), f"{x.shape} {weight.shape} {y.shape}"
    assert bias is not None or not relu
    eight_bit = isinstance(weight, Quantized)
    assert isinstance(x, Quantized) == eight_bit, f"{type(x)} {type(weight)}"
    scales = (x.scale, weight.scale) if eight_bit else ()
    if eight_bit:
        x, weight = x.values, weight.values
    else:
        assert y.dtype in (x.dtype, np.float32), f"{x.dtype} {y.dtype}"
    assert x.dtype == weight.dtype, f"{x.dtype} {weight.dtype}"
    for array in (y, x, weight, *scales):
        assert array.flags.c_contiguous, f"{array.shape} {array.strides}"
    addresses = y.data.ptr | x.data.ptr | weight.data.ptr
    if bias is not None:
        check(bias, bias.dtype, (n,))
        addresses |= bias.data.ptr
    product = cublaslt.Product(
        *(m, n, k),
        operands="float8_e4m3" if eight_bit else x.dtype.name,
        result=y.dtype.name,
        accumulate=accumulate,
        bias=None if bias is None else bias.dtype.name,
        relu=relu,
        alignment=cublaslt.alignment(addresses),
        chosen_for=chosen_for,
    )
    device = cupy.cuda.get_current_stream().device_id
    if bias is None or cublaslt.supports(product, device):
        cublaslt.plan(product, device).run(y, x, weight, *scales, bias=bias)
        return
    plain = product._replace(bias=None, relu=False)
    cublaslt.plan(plain, device).run(y, x, weight, *scales)
    add_bias(y, bias, relu)


def add_bias(rows: Array, bias: Array, relu: bool) -> None:
    """rows += bias, or max(rows + bias, 0) with `relu`: (m, n), (n,).

    Rows have the type of the bias or are float32.
    """
    m, n = rows.shape
    check(rows, rows.dtype, (m, n))
    check(bias, bias.dtype, (n,))
    assert rows.dtype in (bias.dtype, np.float32), f"{rows.dtype} {bias.dtype}"
    constants = definitions.add_constants(storage(bias), n, wide_rows=rows.dtype != bias.dtype)
    launch = kernel("add.cu", "add_bias_relu" if relu else "add_bias", **constants)
    packs = n // definitions.pack_width(n, rows.itemsize)
    launch((m, -(-packs // 256)), (256,), (rows, bias))
