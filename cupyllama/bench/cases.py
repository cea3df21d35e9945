"""Kernels as a bench sees them: how each is launched, checked, and what it cannot do without.

Here are those of all families.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cupyllama.bench.measure import Launch, check, on_host
from cupyllama.bench.shapes import WEIGHT_DEVIATION, random_array
from cupyllama.checkpoint.fields import matrix_shapes
from cupyllama.config import ModelConfig
from cupyllama.ops import reference
from cupyllama.packing import MicroBatch
from cupyllama.quantized import Quantized

CHECKED_ROWS = 64  # of each result
CHECKED_SEGMENTS = 16  # of attention: NumPy takes a second for those with many heads and keys
INDEX_BYTES = 4  # bytes of an int32 or a float32


class Work(NamedTuple):
    """What a launch cannot do without: each operand read once, each result written once."""

    nbytes: int
    flops: int


@dataclass(frozen=True)
class Setting:
    """What all kernels of one shape are given."""

    config: ModelConfig
    dtype: np.dtype
    ops: Any
    batch: MicroBatch

    @property
    def tokens(self) -> int:
        return len(self.batch.token_ids)

    def values(self, *shape: int, seed: int = 1, deviation: float = 1.0) -> Any:
        """Random numbers on the device."""
        return random_array(shape, self.dtype, seed, deviation)


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    name: str
    launch: Launch
    check: Callable[[], None]  # launches it once and compares some of the result
    work: Work
    on_matrix_units: bool = False


def gather_work(rows: int, columns: int, itemsize: int) -> Work:
    """A row's number read, the row read and written."""
    return Work(rows * (INDEX_BYTES + 2 * columns * itemsize), 0)


def gather(setting: Setting) -> Case:
    ops, vocab, hidden = setting.ops, setting.config.vocab_size, setting.config.hidden_size
    table = setting.values(vocab, hidden, deviation=WEIGHT_DEVIATION)
    ids = ops.to_device(setting.batch.token_ids)
    launch = partial(ops.gather, ids, table)

    def checked() -> None:
        some = some_rows(setting.tokens)
        expected = np.stack([host(table[row]) for row in setting.batch.token_ids[some]])
        check("gather", launch()[some], expected, setting.dtype)

    return Case("gather", launch, checked, gather_work(setting.tokens, hidden, table.itemsize))


def quantize_work(rows: int, columns: int, itemsize: int) -> Work:
    """A row read, a byte an element and a scale written; a comparison and a product."""
    return Work(rows * (columns * (itemsize + 1) + INDEX_BYTES), 2 * rows * columns)


def quantize(setting: Setting) -> Case:
    wide = setting.config.q_size  # of what attention leaves, the one that no kernel quantizes
    x = setting.values(setting.tokens, wide)
    launch = partial(setting.ops.quantize, x)

    def checked() -> None:
        some = some_rows(setting.tokens)
        check_rows("quantize", launch(), some, reference.quantize(host(x[some])), setting.dtype)

    return Case("quantize", launch, checked, quantize_work(setting.tokens, wide, x.itemsize))


def dequantize_work(rows: int, columns: int, itemsize: int) -> Work:
    """A byte an element and a scale read, a row written; a product an element."""
    return Work(rows * (columns * (1 + itemsize) + INDEX_BYTES), rows * columns)


def dequantize(setting: Setting) -> Case:
    rows, columns = max(matrix_shapes(setting.config).values(), key=math.prod)
    full = setting.values(rows, columns, deviation=WEIGHT_DEVIATION)
    matrix = setting.ops.quantize(full, kind="int8")
    launch = partial(setting.ops.dequantize, matrix, setting.dtype)

    def checked() -> None:
        some = some_rows(rows)
        chosen = Quantized(*(on_host(part[some]) for part in (matrix.values, matrix.scale)))
        check("dequantize", launch()[some], reference.dequantize(chosen), setting.dtype)

    work = dequantize_work(rows, columns, setting.dtype.itemsize)
    return Case("dequantize", launch, checked, work)


def attention_work(batch: MicroBatch, config: ModelConfig, itemsize: int) -> Work:
    """q, k, v read, the mix written, key_index read; a key that many queries see comes once.

    For each query, each key that it sees and each of its head's elements: a product and a sum for
    the score, the same for the mix. Of n queries over k keys the i-th sees k - n + i + 1.
    """
    n, k = (np.diff(starts).astype(int) for starts in (batch.segment_start, batch.key_start))
    seen = int((n * (k - n) + n * (n + 1) // 2).sum())
    row = (config.qkv_size + config.q_size) * itemsize
    return Work(
        len(batch.token_ids) * row + len(batch.key_index) * INDEX_BYTES, 4 * seen * config.q_size
    )


def attention(setting: Setting, name: str = "attention") -> Case:
    ops, config, batch = setting.ops, setting.config, setting.batch
    heads = (config.num_attention_heads, config.num_key_value_heads)
    qkv, uploaded = setting.values(setting.tokens, config.qkv_size), ops.upload(batch)
    launch = partial(ops.attention, qkv, uploaded, *heads)

    def checked() -> None:
        out = launch()
        segments = len(batch.segment_start) - 1
        for segment in range(0, segments, -(-segments // CHECKED_SEGMENTS)):
            alone, keys = one_segment(batch, segment)
            rows = host(ops.gather(ops.to_device(keys), qkv))
            first, last = batch.segment_start[segment : segment + 2].tolist()
            expected = reference.attention(rows, alone, *heads)[first - last :]
            check(f"{name}, segment {segment},", out[first:last], expected, setting.dtype)

    work = attention_work(batch, config, qkv.itemsize)
    return Case(name, launch, checked, work, on_matrix_units=True)


def one_segment(batch: MicroBatch, segment: int) -> tuple[MicroBatch, np.ndarray]:
    """A micro-batch of one segment's keys in row order, its own tokens last; and their places."""
    keys = batch.key_index[batch.key_start[segment] : batch.key_start[segment + 1]]
    queries = int(np.diff(batch.segment_start)[segment])
    alone = replace(
        batch,
        token_ids=batch.token_ids[keys],
        positions=batch.positions[keys],
        segment_start=np.array([len(keys) - queries, len(keys)], np.int32),
        key_start=np.array([0, len(keys)], np.int32),
        key_index=np.arange(len(keys), dtype=np.int32),
    )
    return alone, keys


def linear_work(tokens: int, n: int, k: int, columns: int, itemsize: int) -> Work:
    """Operands read, `columns` of each row written; a product and a sum for each of n · k pairs."""
    nbytes = ((tokens + n) * k + tokens * columns) * itemsize
    return Work(nbytes, 2 * tokens * n * k)


def log_probs_work(rows: int, vocab: int, targets: int) -> Work:
    """Logits and targets read, two numbers a target written.

    A comparison, a difference, an exponential and a sum a logit.
    """
    return Work(INDEX_BYTES * (rows * vocab + rows + 1 + 3 * targets), 4 * rows * vocab)


def log_probs(setting: Setting) -> Case:
    ops, vocab, batch = setting.ops, setting.config.vocab_size, setting.batch
    rows = min(ops.LOGIT_CHUNK, len(batch.logit_rows))
    logits = random_array((rows, vocab), np.dtype(np.float32), 1, 3.0)
    start, token = batch.target_start[: rows + 1], batch.target_token
    out = ops.to_device(np.zeros((2, len(token)), np.float32))
    arguments = (logits, ops.to_device(start), ops.to_device(token), out)

    def launch() -> Any:
        ops.log_probs(*arguments)
        return out

    def checked() -> None:
        some, expected = min(CHECKED_ROWS, rows), np.zeros(out.shape, np.float32)
        reference.log_probs(host(logits[:some]), start[: some + 1], token, expected)
        wanted = slice(0, int(start[some]))
        check("log_probs", launch()[:, wanted], expected[:, wanted], logits.dtype)

    return Case("log_probs", launch, checked, log_probs_work(rows, vocab, int(start[-1])))


def written(work: Work, rows: int, columns: int, itemsize: int, quantized: bool) -> Work:
    """`work`, and what it takes to write its result."""
    if quantized:
        quantizing = quantize_work(rows, columns, 0)
        return Work(work.nbytes + quantizing.nbytes, work.flops + quantizing.flops)
    return Work(work.nbytes + rows * columns * itemsize, work.flops)


def check_rows(
    name: str, got: Any, some: slice, expected: np.ndarray | Quantized, dtype: np.dtype
) -> None:
    """Compare `some` rows of what was got, which may be quantized."""
    if isinstance(expected, Quantized):
        rows = Quantized(*(on_host(part[some]) for part in (got.values, got.scale)))
        got, expected = reference.dequantize(rows), reference.dequantize(expected)
        check(name, got, expected, np.dtype(ml_dtypes.float8_e4m3fn))
    else:
        check(name, got[some], expected, dtype)


def some_rows(rows: int) -> slice:
    """Every so many-th row: at most CHECKED_ROWS of them, the first among them."""
    return slice(0, None, -(-rows // CHECKED_ROWS))


def host(array: Any) -> np.ndarray:
    """The array here, in float32."""
    return on_host(array).astype(np.float32)
