"""Matrix products through cuBLASLt, each with an algorithm that is chosen once for its shape.

CuPy's own cuBLAS wrapper offers `gemmEx` alone.  cuBLASLt gives what it lacks: scales a row for
operands of 8 bits, a workspace, and a say in the algorithm.  Sums are not split over k: what of
them is added first would depend on how many blocks the device runs at a time.  Only where a product
asks for an algorithm for fewer rows may they be, with parts that are added in one order.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import cupy

# Where nothing else is asked for, a product has the algorithm that is best for so many rows: then a
# row's bits do not depend on how many others there are.
NOMINAL_M = 8192
WORKSPACE_BYTES = 32 << 20  # as NVIDIA advises for Hopper

# cudaDataType_t
DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14, "float8_e4m3": 28}

# Of cublasLt.h
_COMPUTE_32F = 68
_TRANSPOSE_A, _TRANSPOSE_B = 3, 4
_EPILOGUE, _BIAS_POINTER, _BIAS_DATA_TYPE = 7, 8, 26
_RELU, _BIAS = 2, 4  # epilogues, and their sum is both of them
_A_SCALE, _B_SCALE = 17, 18
_FAST_ACCUM = 25
_A_SCALE_MODE, _B_SCALE_MODE = 31, 32
_OUTER_VECTOR = 3
_MAX_WORKSPACE, _REDUCTION_SCHEMES = 1, 3
_REDUCTION_IN_WORKSPACE = 2  # in float32, in one order
_ALIGNMENTS = (5, 6, 7, 8)  # of A, B, C and D
_ALGORITHM_ATTRIBUTES = {
    "id": 0,
    "tile": 1,
    "split_k": 2,
    "reduction": 3,
    "swizzle": 4,
    "custom": 5,
    "stages": 6,
    "inner": 7,
    "cluster": 8,
}
_STATUS = {1: "not initialised", 3: "out of memory", 7: "invalid value", 15: "not supported"}
_REFUSALS = (7, 15)  # of a product, by a library that is well

_ONE, _ZERO = c_float(1), c_float(0)


class Product(NamedTuple):
    """y (m, n) = x (m, k) · weight (n, k)ᵀ, or y += with `accumulate`; names of DATA_TYPES.

    Operands of 8 bits have a float32 scale for each row of x and of weight. A bias (n,) is added
    before the result is rounded, and then `relu` leaves nothing below 0.
    """

    m: int
    n: int
    k: int
    operands: str
    result: str
    accumulate: bool = False
    bias: str | None = None
    relu: bool = False
    alignment: int = 256  # bytes, of all addresses
    chosen_for: int = NOMINAL_M  # the m that its algorithm is best for


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class CublasLtError(RuntimeError):
    """A call that cuBLASLt refused."""

    def __init__(self, call: str, status: int):
        super().__init__(f"{call}: {_STATUS.get(status, 'failed')} (status {status})")
        self.status = status


@cache
def _library() -> ctypes.CDLL:
    # CuPy knows where cuBLAS is; with it comes cuBLASLt, and its name alone finds it then.
    from cupy_backends.cuda.libs import cublas  # noqa: F401

    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    return ctypes.CDLL(f"libcublasLt.so.{major}")


@cache
def _function(name: str):
    function = getattr(_library(), f"cublasLt{name}")
    function.restype = c_int
    return function


def _call(name: str, *arguments) -> None:
    status = _function(name)(*arguments)
    if status:
        raise CublasLtError(f"cublasLt{name}", status)


def version() -> int:
    """Of the library, which is loaded for it: 130100 for 13.1."""
    get_version = _library().cublasLtGetVersion
    get_version.restype = c_size_t
    return get_version()


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    _call("Create", byref(handle))
    return handle


@cache
def _workspace(device: int) -> cupy.cuda.MemoryPointer:
    # Not of the pool: an evaluation that ran out of memory gives the pool back.
    return cupy.cuda.MemoryPointer(cupy.cuda.Memory(WORKSPACE_BYTES), 0)


class Plan:
    """The descriptors and the algorithm of one product, for one device."""

    def __init__(self, product: Product, device: int, rank: int = 0):
        """`rank`: which of the algorithms that the library proposes, best first."""
        self.handle, self.workspace = _handle(device), _workspace(device).ptr
        operand, result = DATA_TYPES[product.operands], DATA_TYPES[product.result]
        m, n, k = product.m, product.n, product.k
        self.descriptor = c_void_p()
        _call("MatmulDescCreate", byref(self.descriptor), _COMPUTE_32F, DATA_TYPES["float32"])
        self._set(_TRANSPOSE_A, c_int(1))
        self._set(_TRANSPOSE_B, c_int(0))
        if product.operands == "float8_e4m3":
            # Sums of 14 bits, not moved to float32 ones now and then: bench/NOTES.md weighs it.
            self._set(_FAST_ACCUM, ctypes.c_int8(1))
            self._set(_A_SCALE_MODE, c_int(_OUTER_VECTOR))
            self._set(_B_SCALE_MODE, c_int(_OUTER_VECTOR))
            self._set_scales(self.workspace, self.workspace)  # some must be there to be asked for
        if product.bias is not None or product.relu:
            self._set_epilogue(product)
        # cuBLAS is column-major and sees transposes: yᵀ (n, m) = weight (n, k) · xᵀ (k, m).
        self.a, self.b = _layout(operand, k, n), _layout(operand, k, m)
        self.d = _layout(result, n, m)
        self.beta = byref(_ONE if product.accumulate else _ZERO)
        if m == product.chosen_for:
            schemes = 0 if m == NOMINAL_M else _REDUCTION_IN_WORKSPACE
            found = self._heuristics(rank + 1, product.alignment, schemes)
            if rank >= len(found):
                raise CublasLtError(f"no algorithm for {product}", 15)
            self.heuristic = found[rank]
        else:
            self.heuristic = plan(product._replace(m=product.chosen_for), device).heuristic
        self.algorithm = byref(self.heuristic)
        self.matmul = _function("Matmul")

    def _set(self, attribute: int, value) -> None:
        size = c_size_t(ctypes.sizeof(value))
        _call("MatmulDescSetAttribute", self.descriptor, attribute, byref(value), size)

    def _set_scales(self, x: int, weight: int) -> None:
        self._set(_A_SCALE, c_void_p(weight))
        self._set(_B_SCALE, c_void_p(x))

    def _set_epilogue(self, product: Product) -> None:
        # A bias is one number for each row of the result, and rows are n: cuBLAS sees transposes.
        epilogue = (_BIAS if product.bias is not None else 0) + (_RELU if product.relu else 0)
        self._set(_EPILOGUE, c_uint32(epilogue))
        if product.bias is not None:
            # Left unsaid, of 8-bit operands it would be a 16-bit type.
            self._set(_BIAS_DATA_TYPE, c_int(DATA_TYPES[product.bias]))
            self._set(_BIAS_POINTER, c_void_p(self.workspace))  # as the scales above

    def _heuristics(self, count: int, alignment: int, schemes: int = 0) -> list[_Heuristic]:
        preference = c_void_p()
        _call("MatmulPreferenceCreate", byref(preference))
        wishes = {_MAX_WORKSPACE: c_uint64(WORKSPACE_BYTES), _REDUCTION_SCHEMES: c_uint32(schemes)}
        wishes |= {operand: c_uint32(alignment) for operand in _ALIGNMENTS}
        for attribute, value in wishes.items():
            size = c_size_t(ctypes.sizeof(value))
            _call("MatmulPreferenceSetAttribute", preference, attribute, byref(value), size)
        found, returned = (_Heuristic * count)(), c_int()
        _call(
            "MatmulAlgoGetHeuristic",
            *(self.handle, self.descriptor, self.a, self.b, self.d, self.d, preference),
            *(count, found, byref(returned)),
        )
        _call("MatmulPreferenceDestroy", preference)
        return [one for one in found[: returned.value] if one.state == 0]

    def configuration(self) -> dict[str, int]:
        """What makes up the algorithm, by cuBLASLt's own numbers."""
        values = {}
        for name, attribute in _ALGORITHM_ATTRIBUTES.items():
            value, written = c_uint32(), c_size_t()
            size = 2 if name in ("inner", "cluster") else 4
            _call(
                "MatmulAlgoConfigGetAttribute",
                *(self.algorithm, attribute, byref(value), c_size_t(size), byref(written)),
            )
            values[name] = value.value
        return values

    def run(
        self,
        y: cupy.ndarray,
        x: cupy.ndarray,
        weight: cupy.ndarray,
        x_scale: cupy.ndarray | None = None,
        weight_scale: cupy.ndarray | None = None,
        bias: cupy.ndarray | None = None,
    ) -> None:
        """Queue the product on the current stream."""
        if bias is not None:
            self._set(_BIAS_POINTER, c_void_p(bias.data.ptr))
        if x_scale is not None:
            self._set_scales(x_scale.data.ptr, weight_scale.data.ptr)
        status = self.matmul(
            *(self.handle, self.descriptor, byref(_ONE)),
            *(c_void_p(weight.data.ptr), self.a, c_void_p(x.data.ptr), self.b),
            self.beta,
            *(c_void_p(y.data.ptr), self.d, c_void_p(y.data.ptr), self.d),
            self.algorithm,
            *(c_void_p(self.workspace), c_size_t(WORKSPACE_BYTES)),
            c_void_p(cupy.cuda.get_current_stream().ptr),
        )
        if status:
            raise CublasLtError("cublasLtMatmul", status)


def _layout(data_type: int, rows: int, columns: int) -> c_void_p:
    layout = c_void_p()
    _call(
        "MatrixLayoutCreate",
        *(byref(layout), data_type, c_uint64(rows), c_uint64(columns), c_int64(rows)),
    )
    return layout


def alignment(addresses: int) -> int:
    """The largest power of two, up to 256, that divides all addresses, given by their `|`."""
    return min(256, (addresses & -addresses) or 256)


_chosen: list[tuple[Product, Plan]] = []


@cache
def plan(product: Product, device: int) -> Plan:
    """The plan of a product: the same one, and so the same bits, in every process."""
    made = Plan(product, device)
    if product.m == product.chosen_for:
        _chosen.append((product, made))
    return made


def algorithms() -> list[dict[str, Any]]:
    """The products for which this process has chosen an algorithm, and which: for the record."""
    return [{**product._asdict(), **made.configuration()} for product, made in _chosen]


@cache
def supports(product: Product, device: int) -> bool:
    """Whether there is an algorithm for it: not all types have every epilogue."""
    try:
        plan(product, device)
    except CublasLtError as error:
        if error.status not in _REFUSALS:
            raise
        return False
    return True
