"""Attention of a step against float64, what it leaves in the cache, and bits against company."""

import numpy as np
import pytest
from device_arrays import BF16, assert_close, assert_same_bits, cuda, every_dtype, host, normal

from cupyllama.kernels import definitions

cupy = pytest.importorskip("cupy")
attention_decode = pytest.importorskip("cupyllama.ops.attention_decode")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

FP16 = np.dtype(np.float16)
# Query and key heads for each head size.
HEADS = {
    **{16: (8, 8), 34: (3, 3), 62: (4, 2), 64: (8, 1), 80: (6, 2), 100: (4, 4), 128: (8, 2)},
    **{130: (2, 1), 192: (4, 2), 254: (3, 1), 256: (8, 2)},
}
LENGTHS = [1, 2, 16, 31, 32, 33, 64, 260, 511, 512, 513, 1000, 2048, 4096]


class Rows:
    """Rows of these lengths, their keys in slots in no order, NaN in all that none of them has."""

    def __init__(self, rng, lengths, head_dim, heads, kv_heads, dtype, scale=1.0):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.lengths = np.array(lengths)  # with the new key; 0: idle
        longest = max(lengths)
        slots = rng.permutation(self.lengths.sum() + 17).astype(np.int32)
        self.cache = np.full((len(slots), 2 * kv_heads * head_dim), np.nan, dtype)
        self.table = np.full((len(lengths), longest + 5), slots[-1], np.int32)
        at = 0
        for row, length in enumerate(lengths):
            own = slots[at : at + length]
            self.table[row, :length] = own
            # The new key's place holds nothing yet.
            self.cache[own[:-1]] = normal(rng, (max(length - 1, 0), self.cache.shape[1]), dtype)
            at += length
        shape = len(lengths), (heads + 2 * kv_heads) * head_dim
        self.qkv = normal(rng, shape, dtype, scale)

    def new_slots(self, rows):
        return self.table[rows, self.lengths[rows] - 1]

    def expected_cache(self, rows):
        cache, busy = self.cache.copy(), [row for row in rows if self.lengths[row]]
        cache[self.new_slots(busy)] = self.qkv[busy, self.heads * self.head_dim :]
        return cache

    def launch(self, rows=None, max_keys=None):
        """What attention gives for some rows, which are the first of the table, and the cache."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        table = self.table[rows]
        if max_keys is not None:
            table = np.pad(table, ((0, 1), (0, max_keys)), mode="edge")[:, :max_keys]
        last = (self.lengths[rows] - 1).astype(np.int32)
        on_device = [cuda.to_device(x) for x in (np.zeros_like(last), np.maximum(last, 0), last)]
        batch = attention_decode.DecodeBatch(*on_device, cuda.to_device(table))
        qkv, cache = cuda.to_device(self.qkv[rows]), cuda.to_device(self.cache)
        out = attention_decode.attention_decode(qkv, batch, self.heads, self.kv_heads, cache)
        assert_same_bits(qkv, self.qkv[rows])
        return host(out), host(cache)

    def expected(self, row):
        """In float64: (heads · head_dim,)."""
        length, head_dim, kv_heads = self.lengths[row], self.head_dim, self.kv_heads
        keys = self.cache[self.table[row, :length]].astype(np.float64)
        keys[-1] = self.qkv[row, self.heads * head_dim :]
        keys, values = np.split(keys.reshape(length, 2 * kv_heads, head_dim), 2, axis=1)
        q = self.qkv[row, : self.heads * head_dim].astype(np.float64)
        q = q.reshape(kv_heads, -1, head_dim)
        scores = np.einsum("hgd,khd->hgk", q, keys) / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hgk,khd->hgd", weights, values).ravel()


def check(rows):
    out, cache = rows.launch()
    assert_same_bits(cache, rows.expected_cache(range(len(rows.lengths))))
    for row, length in enumerate(rows.lengths):
        if length:
            print(f"row {row} of {len(rows.lengths)}, {length} keys")
            assert_close(out[row], rows.expected(row))
        else:
            assert not out[row].any()


@every_dtype
@pytest.mark.parametrize("head_dim", list(HEADS))
def test_decode(rng, dtype, head_dim):
    if dtype == BF16 and head_dim not in (62, 64, 80, 128):
        pytest.skip("as float16")
    for lengths in ([1], [33], [0, 5, 0, 260, 1, 0], rng.permutation(LENGTHS).tolist(), [4096]):
        check(Rows(rng, lengths, head_dim, *HEADS[head_dim], dtype))


@pytest.mark.parametrize(
    "heads, kv_heads", [(56, 56), (32, 32), (32, 8), (64, 8), (28, 4), (16, 1), (5, 1), (22, 2)]
)
def test_decode_of_other_heads(rng, heads, kv_heads):
    check(Rows(rng, [260, 1, 0, 600, 37], 128, heads, kv_heads, FP16))


@pytest.mark.parametrize("rows", [64, 1024])
def test_decode_of_many_rows(rng, rows):
    check(Rows(rng, rng.integers(0, 300, rows).tolist(), 64, 4, 2, FP16))


def test_decode_with_a_sharp_softmax(rng):
    """Peaks move from chunk to chunk, and what was added before all but vanishes."""
    check(Rows(rng, [1500, 700, 90], 128, 4, 2, FP16, scale=6))


def test_infinity_and_nan_stay_in_their_row(rng):
    rows = Rows(rng, [700, 40, 300], 128, 4, 4, FP16)
    rows.cache[rows.table[1, 3]] = np.nan
    rows.cache[rows.table[0, 600]] = np.inf
    out, _ = rows.launch()
    assert np.isnan(out[:2]).all()
    assert_close(out[2], rows.expected(2))


@every_dtype
@pytest.mark.parametrize("head_dim, heads, kv_heads", [(128, 14, 14), (128, 8, 2), (80, 4, 4)])
def test_row_bits_do_not_depend_on_company(rng, dtype, head_dim, heads, kv_heads):
    """Alone, among few and among many rows, in longer tables: other splits, warps and blocks."""
    lengths = [1300, 260, 0, 1, 513] + rng.integers(0, 90, 60).tolist()
    rows = Rows(rng, lengths, head_dim, heads, kv_heads, dtype)
    everything, _ = rows.launch()
    cuts = set()
    for chosen in ([0], [1], [4, 0], [3, 1, 0, 2], list(range(12)), list(range(64, -1, -1))):
        for max_keys in (1300, 1301, 4096):
            out, cache = rows.launch(chosen, max_keys)
            assert_same_bits(out, everything[chosen])
            assert_same_bits(cache, rows.expected_cache(chosen))
            sizes = (cuda.storage(rows.qkv), head_dim, heads, kv_heads)
            cuts.add(attention_decode.cut(len(chosen), max_keys, *sizes))
    print(cuts)
    assert len({splits for splits, _ in cuts}) > 1 and len({warps for _, warps in cuts}) > 1


def test_decode_is_captured_and_replayed_at_other_positions(rng):
    heads, kv_heads, head_dim = 8, 8, 128
    rows = Rows(rng, [900, 900, 900], head_dim, heads, kv_heads, FP16)
    rows.cache = normal(rng, rows.cache.shape, FP16)
    qkv, cache = cuda.to_device(rows.qkv), cuda.to_device(rows.cache)
    last = cuda.to_device(np.full(3, -1, np.int32))
    batch = attention_decode.DecodeBatch(last, last, last, cuda.to_device(rows.table))

    def work():
        batches.append(attention_decode.attention_decode(qkv, batch, heads, kv_heads, cache))

    from cupyllama.ops.graphs import Graphs

    batches, graphs = [], Graphs()
    graph = graphs.capture(work)
    assert_same_bits(cache, rows.cache)  # all of them idle
    for positions in ([5, 899, 520], [-1, 511, 512], [64, 0, 31]):
        last.set(np.array(positions, np.int32))
        graph.launch()
        rows.lengths = np.array(positions) + 1
        expected, rows.cache = rows.launch()
        assert_same_bits(batches[-1], expected)
        assert_same_bits(cache, rows.cache)


def test_shared_memory_and_warps_fit():
    for head_dim in range(2, 257, 2):
        for queries in range(1, 17):
            constants = definitions.attention_decode_constants("FP32", head_dim, 4 * queries, 4, 16)
            assert definitions.attention_decode_shared_bytes(constants) <= 48 * 1024
            assert constants["SPAN"] % constants["WARPS"] == 0
            assert queries % constants["HEADS"] == 0
