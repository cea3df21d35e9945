"""Kernels with constants that stand for all that models ask: what tests compile."""

from collections.abc import Iterator

from cupyllama.kernels import definitions
from cupyllama.kernels.definitions import FP8_ARCH, Constants

# Queries of a kv head, and warps, for which attention_decode.cu is compiled.
_DECODE = ((4, 4), (1, 4), (1, 16), (8, 8))
# Where rare head sizes are compiled too; elsewhere the common ones stand for them.
_THOROUGH = (80, 90)
# Shared memory that a block may have, where it is not what 8.0 has.
_SHARED_KIB = {86: 99, 89: 99, 120: 99, 90: 227, 100: 227}


def variants(arch: int) -> Iterator[tuple[str, Constants]]:
    """Files and constants that stand for all that models ask of `sm_<arch>`."""
    yield "gather.cu", definitions.gather_constants(6656, 2)
    yield "gather.cu", definitions.gather_constants(331, 2)
    yield "attention_store.cu", definitions.attention_store_constants(2 * 8 * 128, 48 * 128, 2)
    yield "attention_store.cu", definitions.attention_store_constants(2 * 31, 3 * 31, 2)
    yield "log_probs.cu", definitions.log_probs_constants(32000)
    yield "log_probs.cu", definitions.log_probs_constants(331)
    for vocab in (50272, 331):
        yield "sampling.cu", definitions.sampling_constants(vocab)
    for storage in definitions.ITEMSIZE:
        for hidden in (6656, 331):
            yield "rmsnorm.cu", definitions.rmsnorm_constants(storage, hidden)
        for hidden in (9216, 331):
            yield "layernorm.cu", definitions.layernorm_constants(storage, hidden)
        yield "rope.cu", definitions.rope_constants(storage, 128, 52, 52)
        yield "swiglu.cu", definitions.swiglu_constants(storage, 17920)
        yield "sum_parts.cu", definitions.sum_parts_constants(storage, 8192, 4)
        yield "add.cu", definitions.add_constants(storage, 7168)
        for columns in (17920, 331):
            yield "quantize.cu", definitions.quantize_constants(storage, columns, "int8")
            yield "dequantize.cu", definitions.dequantize_constants(storage, columns)
        if arch >= FP8_ARCH:
            for columns in (17920, 331):
                yield "quantize.cu", definitions.quantize_constants(storage, columns)
                yield "rmsnorm.cu", definitions.rmsnorm_constants(storage, columns, quantize=True)
                yield (
                    "layernorm.cu",
                    definitions.layernorm_constants(storage, columns, quantize=True),
                )
                yield "swiglu.cu", definitions.swiglu_constants(storage, columns, quantize=True)
        if arch >= 80 and storage != "FP32":
            yield from _few_rows_variants(storage, arch)
        if arch == 90 and storage != "FP32":
            for rows in definitions.FEW_ROWS_SM90:
                few_rows = (storage, rows, "PLAIN", rows == 64)
                yield "few_rows_sm90.cu", definitions.few_rows_sm90_constants(*few_rows)
            for epilogue in ("PLAIN", "RELU", "SWIGLU", "ROPE"):
                few_rows = (storage, 128, epilogue, epilogue == "PLAIN")
                yield "few_rows_sm90.cu", definitions.few_rows_sm90_constants(*few_rows)
            few_rows = (storage, 64, "ROPE", False)
            yield "few_rows_sm90.cu", definitions.few_rows_sm90_constants(*few_rows)
            for fp8 in (False, True):
                yield "gemm_sm90.cu", definitions.gemm_sm90_constants(storage, "SWIGLU", fp8)
                for head_dim in (64, 128):
                    yield (
                        "gemm_sm90.cu",
                        definitions.gemm_sm90_constants(storage, "ROPE", fp8, head_dim),
                    )
        for head_dim in _head_dims(arch):
            heads = (storage, head_dim, 32, 8)
            common = head_dim in (64, 128)
            for queries, warps in _DECODE if common else _DECODE[:1]:
                decode = (storage, head_dim, 8 * queries, 8, warps)
                yield "attention_decode.cu", definitions.attention_decode_constants(*decode)
            for cached in (False, True) if common else (False,):
                yield "attention.cu", definitions.attention_constants(*heads, cached)
                if arch >= 80 and storage != "FP32":
                    yield "attention_mma.cu", definitions.attention_mma_constants(*heads, cached)
                if arch == 90 and storage != "FP32" and head_dim in (64, 128):
                    for queries in (64, 128):
                        constants = definitions.attention_sm90_constants(*heads, queries, cached)
                        yield "attention_sm90.cu", constants
    if arch in _THOROUGH:
        yield "rope.cu", definitions.rope_constants("FP16", 100, 32, 32)
        yield "add.cu", definitions.add_constants("FP16", 331, wide_rows=True)
        yield "swiglu.cu", definitions.swiglu_constants("FP16", 331)
        yield "sum_parts.cu", definitions.sum_parts_constants("BF16", 331, 8)


def _few_rows_variants(storage: str, arch: int) -> Iterator[tuple[str, Constants]]:
    shared_bytes = _SHARED_KIB.get(arch, 163) * 1024
    epilogues = ("RELU", "SWIGLU", "ROPE") if arch in _THOROUGH else ()
    for rows in definitions.FEW_ROWS if arch in _THOROUGH else (8, 64):
        constants = definitions.few_rows_constants(storage, rows, "PLAIN", rows == 8, shared_bytes)
        if constants is not None:
            yield "few_rows.cu", constants
    for epilogue in epilogues:
        yield (
            "few_rows.cu",
            definitions.few_rows_constants(storage, 8, epilogue, False, shared_bytes),
        )
    for eight_bit in (False, True):
        for rows in definitions.GEMV if arch in _THOROUGH else (1, 4):
            for k in (7168, 28672, 11008) if arch == 90 else (7168,):
                shape = (storage, eight_bit, rows, k, "PLAIN", rows == 1)
                yield "gemv.cu", definitions.gemv_constants(*shape, shared_bytes)
        for epilogue in epilogues:
            shape = (storage, eight_bit, 1, 528, epilogue, False)
            yield "gemv.cu", definitions.gemv_constants(*shape, shared_bytes)


def _head_dims(arch: int) -> tuple[int, ...]:
    return (32, 64, 80, 96, 100, 128, 192, 256) if arch in _THOROUGH else (64, 128)
