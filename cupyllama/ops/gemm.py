"""Matrix products through cuBLAS, in the one form that a decoder needs."""

from typing import Any

import numpy as np

# cuBLAS reads alpha and beta from host memory when a product is queued: they live here for good.
_ONE = np.ones(1, np.float32)
_ZERO = np.zeros(1, np.float32)
_ONE_ADDRESS = _ONE.ctypes.data
_ZERO_ADDRESS = _ZERO.ctypes.data

# cublasMath_t: sums split over blocks meet in float32, not in the type of the result.
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16

# cudaDataType_t
_DATA_TYPE = {"float32": 0, "float16": 2, "bfloat16": 14}


def gemm(y: Any, x: Any, weight: Any, accumulate: bool = False) -> None:
    """y = x · weightᵀ, or y += with `accumulate`: (m, n), (m, k), (n, k), all row-major.

    Products are float16, bfloat16 or float32, sums float32 (no TF32); y has the type of x or is
    float32.
    """
    import cupy
    from cupy_backends.cuda.libs import cublas

    (m, k), n = x.shape, weight.shape[0]
    assert weight.shape == (n, k) and y.shape == (m, n), f"{x.shape} {weight.shape} {y.shape}"
    assert x.dtype == weight.dtype, f"{x.dtype} {weight.dtype}"
    assert y.dtype in (x.dtype, np.float32), f"{x.dtype} {y.dtype}"
    for array in (y, x, weight):
        assert array.flags.c_contiguous, f"{array.shape} {array.strides}"
    # Set at each product: CuPy has a handle for each thread and device and may make them anew.
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.setMathMode(handle, _DISALLOW_REDUCED_PRECISION_REDUCTION)
    operand, result = _DATA_TYPE[x.dtype.name], _DATA_TYPE[y.dtype.name]
    # cuBLAS is column-major and sees transposes: yᵀ (n, m) = weight (n, k) · xᵀ (k, m).
    cublas.gemmEx(
        handle,
        cublas.CUBLAS_OP_T,
        cublas.CUBLAS_OP_N,
        *(n, m, k),
        _ONE_ADDRESS,
        *(weight.data.ptr, operand, k),
        *(x.data.ptr, operand, k),
        _ONE_ADDRESS if accumulate else _ZERO_ADDRESS,
        *(y.data.ptr, result, n),
        cublas.CUBLAS_COMPUTE_32F,
        cublas.CUBLAS_GEMM_DEFAULT,
    )
