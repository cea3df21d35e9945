"""Matrix products in the one form that a decoder needs."""

import cupy
import numpy as np

from cupyllama.ops import cublaslt
from cupyllama.quantized import Quantized

Array = cupy.ndarray


def gemm(
    y: Array, x: Array | Quantized, weight: Array | Quantized, accumulate: bool = False
) -> None:
    """y = x · weightᵀ, or y += with `accumulate`: (m, n), (m, k), (n, k), all row-major.

    Operands are float16, bfloat16 or float32, or both quantized; sums are float32 (no TF32; for
    quantized operands as the GPU's 8-bit units add, to about 14 bits within a product). y has
    the type of the operands or is float32; of quantized operands, float16, bfloat16 or float32.

    Raises:
        CublasLtError: with status 15, sizes that 8-bit products do not allow: not multiples of 16.
    """
    (m, k), n = x.shape, len(weight)
    assert weight.shape == (n, k) and y.shape == (m, n), f"{x.shape} {weight.shape} {y.shape}"
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
    product = cublaslt.Product(
        *(m, n, k),
        operands="float8_e4m3" if eight_bit else x.dtype.name,
        result=y.dtype.name,
        accumulate=accumulate,
        alignment=cublaslt.alignment(y.data.ptr | x.data.ptr | weight.data.ptr),
    )
    plan = cublaslt.plan(product, cupy.cuda.get_current_stream().device_id)
    plan.run(y, x, weight, *scales)
