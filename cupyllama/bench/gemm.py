"""`cupyllama bench gemm`: what the matrix products of a model reach by themselves."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from cupyllama.bench.measure import Launch, check, on_host, result, stream_seconds
from cupyllama.bench.shapes import WEIGHT_DEVIATION, model_config, random_array
from cupyllama.bench.table import as_table
from cupyllama.checkpoint.fields import matrix_shapes, stage_fields
from cupyllama.config import ModelConfig
from cupyllama.errors import DeviceError
from cupyllama.families import family_of
from cupyllama.kernels.definitions import FP8_ARCH
from cupyllama.ops import reference
from cupyllama.parallel.devices import Device, choose_dtype, storage_dtype
from cupyllama.quantized import Quantized

Way = Callable[[Any, Any, Any], None]  # y, x, weight

FP8 = "fp8"
CEILING_SECONDS = 1.5  # of a layer's products, the second half of which counts
WARM_SECONDS = 0.2  # until clocks and power are where a run has them
CHECKED_ROWS = 32

# cublasMath_t: sums split over blocks meet in float32, not in the type of the result.
_DISALLOW_REDUCED_PRECISION_REDUCTION = 16


def layer_products(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer as (n, k): out and in."""
    return matrix_shapes(config)


def head_products(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The matrices behind the last layer, likewise."""
    last = range(config.num_hidden_layers - 1, config.num_hidden_layers)
    fields = (field for layer, field in stage_fields(config, last) if layer is None)
    shapes = {field.name: field.shape for field in fields}
    if config.tie_word_embeddings:
        shapes["lm_head"] = shapes["embed_tokens"]
    names = family_of(config).names.last
    return {name: shapes[name] for name in names if len(shapes.get(name, ())) == 2}


def all_products(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Those of a layer, and of the head."""
    return layer_products(config) | head_products(config)


def product_flops(m: int, n: int, k: int) -> int:
    """A multiplication and an addition for each of m · n · k pairs."""
    return 2 * m * n * k


def layer_flops(config: ModelConfig, tokens: int) -> int:
    """Of one layer's products."""
    return sum(product_flops(tokens, n, k) for n, k in layer_products(config).values())


def layer_rate(config: ModelConfig, dtype: str, tokens: int) -> float:
    """FLOP/s of one layer's products in a stream without gaps: what nothing else slows.

    The GPU lowers its clock until it draws the power it may; what it reaches counts after that.
    """
    from cupyllama.ops.gemm import gemm

    products = layer_products(config).values()
    launches = [partial(gemm, *operands(tokens, n, k, dtype)) for n, k in products]
    stream_seconds(launches, 1)  # algorithms are chosen
    turns = max(2, round(CEILING_SECONDS / 2 / stream_seconds(launches, 2)))
    stream_seconds(launches, turns)
    return layer_flops(config, tokens) / stream_seconds(launches, turns)


def operands(m: int, n: int, k: int, dtype: str, out: str | None = None) -> tuple:
    """y, x, weight with the values of a run: zeros draw less power and run faster.

    Args:
        dtype: of x and weight, which "fp8" makes Quantized.
        out: of y; None: as x, or float16 beside fp8.
    """
    storage = storage_dtype("float16" if dtype == FP8 else dtype)
    x = random_array((m, k), storage, 1, 1.0)
    weight = random_array((n, k), storage, 2, WEIGHT_DEVIATION)
    if dtype == FP8:
        from cupyllama.ops.cuda import quantize

        x, weight = quantize(x), quantize(weight)
    return random_array((m, n), storage_dtype(out) if out else storage, 3, 1.0), x, weight


def ways(dtype: str) -> dict[str, Way]:
    """Ways to compute the same product; the others are compared with the first."""
    from cupyllama.ops.gemm import gemm

    return {"gemm": gemm} if dtype == FP8 else {"gemm": gemm, "gemmEx": gemm_ex}


def gemm_ex(y: Any, x: Any, weight: Any) -> None:
    """y = x · weightᵀ as CuPy's own cuBLAS wrapper can compute it."""
    import cupy
    from cupy_backends.cuda.libs import cublas

    (m, k), n = x.shape, len(weight)
    data_type = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
    operand, of_result = data_type[x.dtype.name], data_type[y.dtype.name]
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)  # read before the call returns
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.setMathMode(handle, _DISALLOW_REDUCED_PRECISION_REDUCTION)
    # cuBLAS is column-major and sees transposes: yᵀ (n, m) = weight (n, k) · xᵀ (k, m).
    cublas.gemmEx(
        handle,
        cublas.CUBLAS_OP_T,
        cublas.CUBLAS_OP_N,
        *(n, m, k, one.ctypes.data),
        *(weight.data.ptr, operand, k),
        *(x.data.ptr, operand, k, zero.ctypes.data),
        *(y.data.ptr, of_result, n),
        cublas.CUBLAS_COMPUTE_32F,
        cublas.CUBLAS_GEMM_DEFAULT,
    )


def measure_gemm(
    device: Device, shapes: list[str], dtype: str, tokens: list[int], repeats: int
) -> dict[str, Any]:
    """Every product of the shapes at every number of tokens, each way in turn.

    Raises:
        DeviceError: the device cannot compute in `dtype`.
        CupyllamaError: a product is wrong.
    """
    from cupyllama.ops.cublaslt import algorithms

    if dtype != FP8:
        choose_dtype(dtype, dtype, device)
    elif device.compute_capability < FP8_ARCH:
        raise DeviceError(f"{device.name} has no fp8", "Give --dtype float16.")
    runs = []
    for shape in shapes:
        for name, (n, k) in all_products(model_config(shape)).items():
            for m in tokens:
                # logits are float32
                arrays = operands(m, n, k, dtype, "float32" if name == "lm_head" else None)
                seconds = time_ways(f"{name} of {shape}", arrays, ways(dtype), repeats)
                flops = product_flops(m, n, k)
                runs.append(
                    {
                        "shape": shape,
                        "product": name,
                        **{"m": m, "n": n, "k": k},
                        "seconds": seconds,
                        "tflops": {way: flops / time / 1e12 for way, time in seconds.items()},
                    }
                )
                del arrays
    return result("gemm", device, dtype=dtype, runs=runs, algorithms=algorithms())


def time_ways(name: str, arrays: tuple, run: dict[str, Way], repeats: int) -> dict[str, float]:
    """Seconds of one product, each way in turn `repeats` times: the median by way."""
    launches: dict[str, Launch] = {way: partial(run[way], *arrays) for way in run}
    for way, launch in launches.items():
        launch()
        check_rows(f"{way} ({name})", *arrays)
    first = next(iter(launches.values()))
    turns = max(1, round(WARM_SECONDS / stream_seconds([first], 2)))
    stream_seconds([first], turns)
    times: dict[str, list[float]] = {way: [] for way in launches}
    for _ in range(repeats):
        for way, launch in launches.items():
            times[way].append(stream_seconds([launch], max(2, turns // 10)))
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def check_rows(name: str, y: Any, x: Any, weight: Any) -> None:
    """Some rows and columns of a product beside NumPy's in float64."""
    across, along = (-(-len(matrix) // CHECKED_ROWS) for matrix in (x, weight))
    rows, columns = _rows(x, across), _rows(weight, along)
    dtype = np.dtype(ml_dtypes.float8_e4m3fn) if isinstance(x, Quantized) else x.dtype
    check(name, y[::across, ::along], rows @ columns.T, dtype)


def _rows(matrix: Any, step: int) -> np.ndarray:
    if isinstance(matrix, Quantized):
        some = Quantized(on_host(matrix.values[::step]), on_host(matrix.scale[::step]))
        return reference.dequantize(some).astype(np.float64)
    return on_host(matrix[::step]).astype(np.float64)


def gemm_table(measured: dict[str, Any]) -> str:
    """A line for each product and number of tokens."""
    first, *others = measured["runs"][0]["seconds"]
    headers = ["shape", "product", "m", "n", "k"]
    headers += [column for way in (first, *others) for column in (f"{way} us", "TFLOP/s")]
    headers += [f"{first} / {way}" for way in others]
    lines = []
    for run in measured["runs"]:
        line = [run["shape"], run["product"], *(f"{run[size]:,}" for size in "mnk")]
        for way in (first, *others):
            line += [f"{1e6 * run['seconds'][way]:,.1f}", f"{run['tflops'][way]:,.1f}"]
        line += [f"{run['tflops'][first] / run['tflops'][way]:.3f}" for way in others]
        lines.append(line)
    return as_table(headers, lines, left=2)
