"""The constants that each kernel is compiled with, and the shared memory that follows from them."""

import itertools
import math
from typing import Any

# What -DSTORAGE may be, and the bytes of a number of it.
ITEMSIZE = {"FP16": 2, "BF16": 2, "FP32": 4}
# Bytes of a row of shared memory in the widest swizzle of Hopper's copy engine.
PITCH = 128
# The first with 8-bit floating point.
FP8_ARCH = 89
# What QUANTIZE of row.cuh is for each kind.
_QUANTIZE = {"fp8": 1, "int8": 2}

# attention_sm90.cu: keys of a step, on which bits depend, and neighbouring items that run together;
# the mark of steps whose keys lie side by side.
STEP_KEYS = 128
SECTION = 16
CONTIGUOUS = 0x8000
# attention_decode.cu: keys of a warp, on which bits depend.
DECODE_CHUNK = 32

# few_rows.cu: as many rows of x as a tile takes, and the shape of a block then: ROWS, ROW_WARPS,
# TOKEN_WARPS, K_WARPS, CHUNKS, STAGES, BLOCKS (of a multiprocessor).
FEW_ROWS = {
    8: (64, 2, 1, 4, 1, 4, 2),
    16: (128, 4, 1, 2, 1, 4, 2),
    32: (128, 4, 1, 2, 2, 3, 1),
    64: (128, 4, 1, 2, 1, 4, 1),
    128: (128, 4, 2, 1, 2, 2, 1),
}
# few_rows_sm90.cu: as many rows of x as a tile takes, those of w that it has, and k of a stage.
FEW_ROWS_SM90 = (16, 32, 64, 128)
FEW_ROWS_SM90_TILE = 256
FEW_ROWS_SM90_STAGE = 128
# gemv.cu: for how many rows of x it is compiled, and what it is the fastest with on 9.0: warps of a
# block, words of x in the registers of a lane, and shared memory at most.
GEMV = (1, 2, 4)
GEMV_WARPS = 16
GEMV_WORDS = 32
GEMV_SHARED_BYTES = 200 * 1024

Constants = dict[str, Any]


def pack_width(n: int, itemsize: int) -> int:
    """The most numbers, up to 16 bytes of them, by which rows of n can be cut evenly."""
    return math.gcd(n, 16 // itemsize)


def gather_constants(columns: int, itemsize: int) -> Constants:
    unit = math.gcd(columns * itemsize, 16)
    return {"UNITS": columns * itemsize // unit, "UNIT_BYTES": unit}


def rmsnorm_constants(storage: str, hidden: int, quantize: bool = False) -> Constants:
    threads = _row_threads(storage, hidden)
    return {"STORAGE": storage, "HIDDEN": hidden, "THREADS": threads, "QUANTIZE": int(quantize)}


def layernorm_constants(storage: str, hidden: int, quantize: bool = False) -> Constants:
    return rmsnorm_constants(storage, hidden, quantize)


def add_constants(storage: str, wide: int, wide_rows: bool = False) -> Constants:
    """Of add.cu.  `wide_rows`: what is added to is float32, whatever STORAGE is."""
    return {"STORAGE": storage, "ROWS_T": "float" if wide_rows else "storage_t", "WIDE": wide}


def quantize_constants(storage: str, columns: int, kind: str = "fp8") -> Constants:
    constants = {"STORAGE": storage, "COLUMNS": columns, "QUANTIZE": _QUANTIZE[kind]}
    return constants | {"THREADS": _row_threads(storage, columns)}


def dequantize_constants(storage: str, columns: int) -> Constants:
    return {"STORAGE": storage, "COLUMNS": columns, "THREADS": 256, "SLOTS": 4}


def swiglu_constants(storage: str, intermediate: int, quantize: bool = False) -> Constants:
    constants = {"STORAGE": storage, "INTERMEDIATE": intermediate, "QUANTIZE": int(quantize)}
    if quantize:
        constants["THREADS"] = _row_threads(storage, intermediate)
    return constants


def _row_threads(storage: str, columns: int) -> int:
    """A multiple of 32 that wastes few lanes and holds a row in 40 registers a thread.

    Two packs a thread are best up to 1,024 of a row, if none is left over: norms to fp8 of 6,656
    numbers by 416 threads take 60 us for 8,192 tokens, by 224 66, by 832 90.
    """
    width = pack_width(columns, ITEMSIZE[storage])
    packs = columns // width
    slots = 2 if 256 < packs <= 1024 else min(-(-packs // 256), 40 // width)
    threads = -(-packs // (32 * slots)) * 32
    assert threads <= 1024, f"a row of {columns} does not fit the registers of a block"
    return threads


def rope_constants(
    storage: str, head_dim: int, num_heads: int, num_key_value_heads: int
) -> Constants:
    rotated = num_heads + num_key_value_heads
    row = (rotated + num_key_value_heads) * head_dim
    return {"STORAGE": storage, "HEAD_DIM": head_dim, "ROTATED_HEADS": rotated, "ROW": row}


def attention_constants(
    storage: str, head_dim: int, num_heads: int, num_key_value_heads: int, cached: bool = False
) -> Constants:
    """Of attention.cu.  WARP_QUERIES: as many as 48 KiB of shared memory allow."""
    return {
        "STORAGE": storage,
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_key_value_heads,
        "CACHED": int(cached),
        "WARP_QUERIES": 8 if head_dim <= 128 else 2,
    }


def attention_mma_constants(
    storage: str, head_dim: int, num_heads: int, num_key_value_heads: int, cached: bool = False
) -> Constants:
    """Of attention_mma.cu.  KEYS: a tile of them, by the head size alone because bits depend on it;
    the scores of a larger one would not fit the registers beside the queries and the output."""
    return {
        "STORAGE": storage,
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_key_value_heads,
        "CACHED": int(cached),
        "KEYS": 64 if head_dim <= 128 else 32 if head_dim <= 192 else 16,
    }


def attention_mma_shared_bytes(constants: Constants) -> int:
    """Two stages of keys and values, rows padded to 16 numbers and by 16 bytes more."""
    pitch = 2 * (-(-constants["HEAD_DIM"] // 16) * 16) + 16
    return 2 * 2 * constants["KEYS"] * pitch


def attention_sm90_constants(
    storage: str,
    head_dim: int,
    num_heads: int,
    num_key_value_heads: int,
    item_queries: int,
    cached: bool = False,
) -> Constants:
    """Of attention_sm90.cu, for items of 64 or 128 queries.

    BUFFERS: of keys or values of a step, what the shared memory of a multiprocessor holds for two
    blocks of one warpgroup that multiplies, or for one block of two.  CHUNK: heads whose keys and
    values the L2 cache holds for the items of a section.
    """
    assert item_queries in (64, 128), f"{item_queries=}"
    return {
        "STORAGE": storage,
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_key_value_heads,
        "CACHED": int(cached),
        "GROUPS": item_queries // 64,
        "BUFFERS": 3 if item_queries == 64 else 6,
        "KEYS": STEP_KEYS,
        "CONTIGUOUS": CONTIGUOUS,
        "SECTION": SECTION,
        "CHUNK": max(n for n in range(1, 17) if num_heads % n == 0),
    }


def attention_sm90_shared_bytes(constants: Constants) -> int:
    """Queries and buffers, positions, barriers, and records from producers to consumers."""
    queries, buffers = 64 * constants["GROUPS"], constants["BUFFERS"]
    matrices = (queries + buffers * constants["KEYS"]) * 2 * constants["HEAD_DIM"]
    return matrices + 4 * queries + 8 * (2 * buffers + 2) + 32 + 16 * buffers


def attention_store_constants(columns: int, row: int, itemsize: int) -> Constants:
    """Of attention_store.cu: of rows of `row` numbers the last `columns` are stored."""
    unit = math.gcd(columns * itemsize, row * itemsize, 16)
    units = {"UNITS": columns * itemsize // unit, "ROW_UNITS": row * itemsize // unit}
    return units | {"UNIT_BYTES": unit}


def attention_decode_constants(
    storage: str, head_dim: int, num_heads: int, num_key_value_heads: int, warps: int = 4
) -> Constants:
    """Of attention_decode.cu, by blocks of 4, 8 or 16 warps, on which no bits depend.

    HEADS: how many queries of a kv head share what is read.  AT_ONCE, BLOCKS: what the registers
    hold of keys and values beside so many queries and sums, and for how many blocks.  SPAN: what 33
    KiB of shared memory hold.
    """
    queries, itemsize = num_heads // num_key_value_heads, ITEMSIZE[storage]
    heads = max(n for n in range(1, 9) if queries % n == 0 and n * head_dim <= 1024 or n == 1)
    at_once = 8 if heads == 1 else 4 if heads <= 4 else 2
    columns = heads * head_dim
    span, blocks = 16 if columns <= 512 else 8, 2
    if heads <= 4 and columns <= 512:
        blocks = 4 if heads <= 2 and columns <= 256 else 3
    return {
        "STORAGE": storage,
        "HEAD_DIM": head_dim,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_key_value_heads,
        "HEADS": heads,
        # Where a key is more than a warp reads in one access, each lane has more of it.
        "AT_ONCE": at_once // 2 if head_dim // pack_width(head_dim, itemsize) > 32 else at_once,
        "CHUNK": DECODE_CHUNK,
        "SPAN": span,
        "WARPS": min(warps, span, 16 if blocks == 4 else 8),
        "BLOCKS": 1 if warps > 4 else blocks,
    }


def attention_decode_shared_bytes(constants: Constants) -> int:
    """Of the chunks of a span a sum of values, a peak and a total for each head."""
    return 4 * constants["SPAN"] * constants["HEADS"] * (constants["HEAD_DIM"] + 2)


def gemm_sm90_constants(storage: str, epilogue: str, fp8: bool, head_dim: int = 0) -> Constants:
    """Of gemm_sm90.cu; bits depend on none that is chosen here.

    GROUP, STAGGER: what was fastest at the sizes of 7B and 30B, of 8,192 tokens.

    Args:
        epilogue: SWIGLU, or ROPE with `head_dim`.
    """
    return {
        "STORAGE": storage,
        "EPILOGUE": epilogue,
        "FP8": int(fp8),
        "HEAD_DIM": head_dim,
        "TILE_M": 128,
        "TILE_N": 256,
        "CLUSTER": 2,
        "STAGES": 4,
        "GROUP": 8 if fp8 else 16,
        "STAGGER": 2 if fp8 else 0,
    }


def gemm_sm90_shared_bytes(constants: Constants) -> int:
    """A ring of rows of x and of weight, and two barriers a stage."""
    return constants["STAGES"] * ((constants["TILE_M"] + constants["TILE_N"]) * PITCH + 16)


def few_rows_constants(
    storage: str, rows: int, epilogue: str, wide: bool, shared_bytes: int
) -> Constants | None:
    """Of few_rows.cu, or None where it takes fewer rows.  Bits depend on all of these, and on how
    many blocks there are.

    Args:
        rows: of x.
        epilogue: PLAIN, RELU, SWIGLU or ROPE.
        wide: the result is float32.
        shared_bytes: what a block may have: less makes shorter rings, and other tiles.
    """
    names = ("ROWS", "ROW_WARPS", "TOKEN_WARPS", "K_WARPS", "CHUNKS", "STAGES", "BLOCKS")
    for tokens in (size for size in FEW_ROWS if size >= rows):
        constants = dict(zip(names, FEW_ROWS[tokens], strict=True), TOKENS=tokens)
        # As many parts of k as put their sums side by side in 24 KiB; the others are added to them.
        parts = constants["K_WARPS"]
        while parts > 1 and parts * tokens * (constants["ROWS"] + 4) * 4 > 24 * 1024:
            parts //= 2
        constants |= {"STORAGE": storage, "EPILOGUE": epilogue, "SUM_PARTS": parts}
        constants["OUT_T"] = "float" if wide else "storage_t"
        while constants["STAGES"] > 2 and few_rows_shared_bytes(constants) > shared_bytes:
            constants["STAGES"] -= 1
        if few_rows_shared_bytes(constants) <= shared_bytes:
            return constants
    return None


def few_rows_shared_bytes(constants: Constants) -> int:
    """The ring of rows of w and of x, and the sums."""
    k = constants["K_WARPS"] * constants["CHUNKS"]  # in 64 bytes of w
    ring = constants["STAGES"] * k * (64 * constants["ROWS"] + 128 * constants["TOKENS"])
    return ring + constants["SUM_PARTS"] * constants["TOKENS"] * (constants["ROWS"] + 4) * 4


def few_rows_sm90_constants(storage: str, rows: int, epilogue: str, wide: bool) -> Constants:
    """Of few_rows_sm90.cu.  Bits depend on how many blocks there are.

    STAGES: what the shared memory of a multiprocessor holds.

    Args:
        rows: of x.
        epilogue: PLAIN, RELU, SWIGLU or ROPE.
        wide: the result is float32.
    """
    constants = {
        "STORAGE": storage,
        "EPILOGUE": epilogue,
        "OUT_T": "float" if wide else "storage_t",
        "TOKENS": next(size for size in FEW_ROWS_SM90 if rows <= size),
    }
    stage = few_rows_sm90_shared_bytes(constants | {"STAGES": 1})
    return constants | {"STAGES": 227 * 1024 // stage}


def few_rows_sm90_shared_bytes(constants: Constants) -> int:
    """A ring of w and x, two barriers a stage, and a word for each of four warpgroups."""
    row = FEW_ROWS_SM90_STAGE
    stage = FEW_ROWS_SM90_TILE * row + constants["TOKENS"] * 2 * row
    return constants["STAGES"] * (stage + 16) + 16


def gemv_constants(
    storage: str, eight_bit: bool, rows: int, k: int, epilogue: str, wide: bool, shared_bytes: int
) -> Constants:
    """Of gemv.cu.  Bits depend on K_WARPS, SLICE and TOKENS; arguments as of few_rows_constants.

    Args:
        eight_bit: weights are int8.
    """
    tokens = next(size for size in GEMV if rows <= size)
    units = -(-k * (1 if eight_bit else 2) // 512)
    most_units = max(1, GEMV_WORDS // (tokens * (8 if eight_bit else 4)))

    def cost(cut: tuple[int, int]) -> float:
        """Units that are none, passes over the pairs, and warps that are missing."""
        k_warps, units_at_once = cut
        passes = -(-units // (k_warps * units_at_once))
        idle = 1 - k_warps * (GEMV_WARPS // k_warps) / GEMV_WARPS
        return k_warps * units_at_once * passes / units + 0.02 * passes + 0.2 * idle

    cuts = itertools.product(range(GEMV_WARPS, 0, -1), range(1, most_units + 1))
    k_warps, units_at_once = min(cuts, key=cost)
    groups, band = GEMV_WARPS // k_warps, 32
    sums = 2 * k_warps * band * 2 * tokens * 4
    room = min(shared_bytes, GEMV_SHARED_BYTES) - sums
    return {
        "STORAGE": storage,
        "INT8": int(eight_bit),
        "EPILOGUE": epilogue,
        "OUT_T": "float" if wide else "storage_t",
        "K": k,
        "TOKENS": tokens,
        "K_WARPS": k_warps,
        "GROUPS": groups,
        "SLICE": units_at_once,
        "DEPTH": min(room // (k_warps * groups * 1024), 16),
        "BAND": band,
    }


def gemv_shared_bytes(constants: Constants) -> int:
    """The rings, and the sums of two bands."""
    k_warps, pairs = constants["K_WARPS"], constants["BAND"]
    ring = constants["DEPTH"] * k_warps * constants["GROUPS"] * 1024
    return ring + 2 * k_warps * pairs * 2 * constants["TOKENS"] * 4


def sum_parts_constants(storage: str, count: int, ranks: int) -> Constants:
    return {"STORAGE": storage, "WIDTH": pack_width(count, ITEMSIZE[storage]), "RANKS": ranks}


def log_probs_constants(vocab: int) -> Constants:
    return {"VOCAB": vocab, "THREADS": 512}


def sampling_constants(vocab: int) -> Constants:
    """Of sampling.cu.  WEIGHT_BITS: likelihoods of all tokens add up to less than 2^32."""
    return {"VOCAB": vocab, "THREADS": 1024, "WEIGHT_BITS": min(32 - vocab.bit_length(), 20)}
