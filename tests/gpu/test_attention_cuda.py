"""Every attention kernel against its definition, and the bits of a row against its company."""

import itertools

import numpy as np
import pytest
from device_arrays import (
    BF16,
    assert_close,
    assert_same_bits,
    cuda,
    every_dtype,
    host,
    normal,
    wide,
)

from cupyllama.generation.batch import CachedBatch, Segment, cached_batch
from cupyllama.ops import reference
from cupyllama.packing import TokenRow, pack

cupy = pytest.importorskip("cupy")
decode_cuda = pytest.importorskip("cupyllama.ops.decode_cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]

FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
CHECKED_SEGMENTS = 12
# So many at a time, for all scores of a long segment in float64 would take gigabytes.
QUERIES_AT_ONCE = 512

# Query and key heads for each head size.
HEADS = {
    **{32: (4, 4), 62: (2, 1), 64: (8, 2), 80: (3, 1), 96: (2, 2), 100: (4, 4)},
    **{128: (8, 2), 130: (2, 2), 192: (2, 1), 196: (4, 2), 254: (3, 1), 256: (3, 3)},
}
# Rows, the longest of them, and tokens of a micro-batch.
FORESTS = [(1, 1, 16), (3, 5, 64), (40, 170, 2048), (9, 700, 2048)]


def upload(batch, item_queries):
    """The micro-batch with items of so many queries, whatever `upload` would choose."""
    ops = decode_cuda if isinstance(batch, CachedBatch) else cuda
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "item_queries", lambda _: item_queries)
        return ops.upload(batch)


def kernels_for(dtype, head_dim):
    """Names and launches, of arrays at the host, of all that this device has for such heads."""

    def on(attention, item_queries):
        def launch(qkv, batch, heads, kv_heads, cache=None):
            given, uploaded = cuda.to_device(qkv), upload(batch, item_queries)
            out = host(attention(given, uploaded, heads, kv_heads, cache))
            again = attention(given, uploaded, heads, kv_heads, cache)  # all is as it was before
            assert_same_bits(again, out)
            assert_same_bits(given, qkv)
            assert host(uploaded.counter) == [0]
            return out

        return launch

    found = {}
    capability = int(cupy.cuda.Device().compute_capability)
    if dtype == FP32 or head_dim in (62, 64, 128, 196):
        found["portable"] = on(cuda.attention_portable, 64)
    if capability >= 80 and dtype.itemsize == 2:
        found["mma"] = on(cuda.attention_mma, 128)
        if capability == 90 and head_dim in (64, 128):
            found["sm90, 64"] = on(cuda.attention_sm90, 64)
            found["sm90, 128"] = on(cuda.attention_sm90, 128)
    return found


def forest(rng, rows, longest, tokens):
    """Micro-batches of random rows of 1 to `longest` tokens, most of which share a prefix."""
    token_rows: list[TokenRow] = []
    for choice in range(rows):
        token_ids = rng.integers(0, 99, rng.integers(2, longest + 2)).tolist()
        if token_rows and rng.random() < 0.7:
            other = token_rows[rng.integers(len(token_rows))].token_ids
            cut = rng.integers(len(other))
            token_ids = (other[:cut] + token_ids)[: longest + 1]
        token_rows.append(TokenRow(token_ids, len(token_ids) - 1, choice))
    return list(pack(token_rows, tokens, 8))


def prompts(rng, *prompts):
    """A micro-batch of rows of prompts, each (its length, the lengths of its endings ...)."""
    rows = []
    for length, *endings in prompts:
        prompt = rng.integers(0, 1 << 20, length + 1).tolist()
        for ending in endings:
            token_ids = prompt + rng.integers(0, 1 << 20, ending).tolist()
            rows.append(TokenRow(token_ids, length, len(rows)))
    (batch,) = pack(rows, sum(len(row.token_ids) for row in rows), 8)
    return batch


def check_kernels(rng, qkv, batch, heads, kv_heads):
    """All kernels on the first, the last and some other segments; and that all is finite.

    What is for either size of items has the same bits.
    """
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    outs = {
        name: launch(qkv, batch, heads, kv_heads)
        for name, launch in kernels_for(qkv.dtype, head_dim).items()
    }
    assert all(np.isfinite(wide(out)).all() for out in outs.values())
    if "sm90, 64" in outs:
        assert_same_bits(outs["sm90, 64"], outs["sm90, 128"])
    x = qkv.reshape(len(qkv), -1, head_dim)
    count = len(batch.segment_start) - 1
    for s in {0, count - 1, *rng.integers(0, count, CHECKED_SEGMENTS).tolist()}:
        first, last = batch.segment_start[s : s + 2]
        row = x[batch.key_index[batch.key_start[s] : batch.key_start[s + 1]]].astype(np.float64)
        n, k = last - first, len(row)
        keys, values = (
            np.repeat(part.transpose(1, 0, 2), heads // kv_heads, axis=0)
            for part in np.split(row[:, heads:], 2, axis=1)
        )
        expected = np.empty((n, heads, head_dim))
        for begin in range(0, n, QUERIES_AT_ONCE):
            at = np.arange(k - n + begin, k - n + min(begin + QUERIES_AT_ONCE, n))
            q = row[at, :heads].transpose(1, 0, 2)
            scores = q @ keys.transpose(0, 2, 1) / np.sqrt(head_dim)
            scores[:, np.arange(k) > at[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weighted = weights / weights.sum(axis=-1, keepdims=True) @ values
            expected[begin : begin + len(at)] = weighted.transpose(1, 0, 2)
        for name, out in outs.items():
            print(f"{name}, segment {s} of {count}, {n} queries, {k} keys")
            assert_close(out[first:last], expected.reshape(n, -1))


@every_dtype
@pytest.mark.parametrize("head_dim", list(HEADS))
def test_attention(rng, dtype, head_dim):
    heads, kv_heads = HEADS[head_dim]
    if dtype == BF16 and head_dim not in (64, 100, 128):
        pytest.skip("as float16")
    for shape in FORESTS:
        for batch in forest(rng, *shape)[:2]:
            wide_row = (heads + 2 * kv_heads) * head_dim
            qkv = normal(rng, (len(batch.token_ids), wide_row), dtype, 1.5)
            check_kernels(rng, qkv, batch, heads, kv_heads)


@pytest.mark.parametrize(
    "head_dim, heads, kv_heads", [(128, 32, 8), (128, 52, 52), (128, 3, 3), (64, 3, 3)]
)
def test_attention_of_other_heads(rng, head_dim, heads, kv_heads):
    batch = prompts(rng, (1, 1), (63, 1, 1, 65), (127, 64, 63, 1, 5), (200, 128, 130, 1))
    qkv = normal(rng, (len(batch.token_ids), (heads + 2 * kv_heads) * head_dim), FP16, 1.5)
    check_kernels(rng, qkv, batch, heads, kv_heads)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_over_long_rows(rng, dtype, head_dim):
    heads, kv_heads = HEADS[head_dim]
    batch = prompts(
        rng,
        *((2210, 90, 1, 64, 30), (129, 300, 1), (700, 3, 90, 1, 1, 1, 33, 17)),
        *((1984, 64, 63, 65), (4000, 96, 30)),
    )
    # sharp softmax: the peak moves
    qkv = normal(rng, (len(batch.token_ids), (heads + 2 * kv_heads) * head_dim), dtype, 2)
    check_kernels(rng, qkv, batch, heads, kv_heads)


@pytest.mark.parametrize("head_dim, heads, kv_heads", [(128, 32, 8), (64, 16, 16)])
def test_attention_of_few_shot_prompts(rng, head_dim, heads, kv_heads):
    """Many pieces of work for each block, of steps that lie side by side and of some that do not;
    and most have rows for both warpgroups in some steps, for one in others."""
    batch = prompts(rng, *[(1500, 30, 30, 30, 30)] * 5)
    qkv = normal(rng, (len(batch.token_ids), (heads + 2 * kv_heads) * head_dim), FP16, 1.5)
    check_kernels(rng, qkv, batch, heads, kv_heads)


@pytest.mark.parametrize("item_queries", [64, 128])
def test_many_launches_are_alike(rng, item_queries):
    """What depends on which warp is late shows in one of many."""
    batch = upload(prompts(rng, *[(1500, 30, 30, 30, 30)] * 5), item_queries)
    qkv = cuda.to_device(normal(rng, (len(batch.token_ids), 48 * 128), FP16, 1.5))
    first = host(cuda.attention(qkv, batch, 32, 8))
    for _ in range(6):
        for _ in range(60):
            out = cuda.attention(qkv, batch, 32, 8)
        assert_same_bits(out, first)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 100, 128, 196, 256])
def test_row_bits_do_not_depend_on_company(rng, dtype, head_dim):
    """The same rows among all others, among some, and alone, by items of either size."""
    if dtype == BF16 and head_dim not in (64, 100, 128):
        pytest.skip("as float16")
    heads, kv_heads = HEADS[head_dim]
    vectors = normal(rng, (5003, (heads + 2 * kv_heads) * head_dim), dtype)
    rows = [(50, 10, 12, 9), (300, 30, 31, 29, 30), (90, 70, 2), (128, 64, 64), (7, 3)]
    rows += [(520, 30, 30, 30)]
    rows = [TokenRow(*row) for row in _rows(rng, rows)]
    chosen = [rows, rows[1::2], rows[::3], *([row] for row in rows[::4])]
    bits = {}
    for name, launch in kernels_for(dtype, head_dim).items():
        seen = {}
        for some in chosen:
            (batch,) = pack(some, 4096, 8)
            prefixes = _prefixes(batch)
            # What a token's vector is, its row up to it decides.
            qkv = vectors[[hash(prefix) % len(vectors) for prefix in prefixes]]
            out = launch(qkv, batch, heads, kv_heads)
            for prefix, row in zip(prefixes, out, strict=True):
                assert seen.setdefault(prefix, row.tobytes()) == row.tobytes(), name
        bits[name] = seen
    if "sm90, 64" in bits:
        assert bits["sm90, 64"] == bits["sm90, 128"]


def _rows(rng, shapes):
    for length, *endings in shapes:
        prompt = rng.integers(0, 1 << 20, length + 1).tolist()
        for ending in endings:
            yield prompt + rng.integers(0, 1 << 20, ending).tolist(), length, 0


def _prefixes(batch):
    """Of every packed place, the tokens of its row up to it."""
    prefixes = []
    for s in range(len(batch.segment_start) - 1):
        row = batch.token_ids[batch.key_index[batch.key_start[s] : batch.key_start[s + 1]]].tolist()
        own = int(np.diff(batch.segment_start)[s])
        prefixes += [tuple(row[: len(row) - own + i + 1]) for i in range(own)]
    return prefixes


@pytest.mark.parametrize("head_dim, heads", [(32, 4), (64, 3)])
def test_attention_over_many_segments(rng, head_dim, heads):
    """More than a grid has rows; each is one token, which sees its own value alone."""
    (batch,) = pack([TokenRow([i, 0], 1, i) for i in range(70_000)], 70_000, 1)
    qkv = normal(rng, (70_000, 3 * heads * head_dim), FP16)
    for launch in kernels_for(FP16, head_dim).values():
        # equal, but not in the sign of a zero: -0 added to what a tile has of zeros is 0
        out = launch(qkv, batch, heads, heads)
        np.testing.assert_array_equal(out, qkv[:, 2 * heads * head_dim :])


@pytest.mark.parametrize("prompt", [0, 63, 127])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_ignores_other_rows(rng, head_dim, prompt):
    """NaN in what is a row's own stays in that row; its neighbours' steps end beside it."""
    heads, kv_heads = HEADS[head_dim]
    rows = [TokenRow([9] * prompt + [first] * 102, 1, first) for first in range(3)]
    (batch,) = pack(rows, prompt + 303, 1)
    qkv = normal(rng, (prompt + 303, (heads + 2 * kv_heads) * head_dim), FP16)
    first, last = batch.segment_start[1:3]
    assert last - first == 101
    qkv[first:last] = np.nan
    for name, attention in kernels_for(FP16, head_dim).items():
        out = wide(attention(qkv, batch, heads, kv_heads))
        assert np.isfinite(out[:first]).all() and np.isfinite(out[last:]).all(), name
        assert np.isnan(out[first:last]).all(), name


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 100, 128])
def test_attention_chooses_a_kernel(rng, dtype, head_dim):
    heads, kv_heads = HEADS[head_dim]
    batch = forest(rng, 9, 100, 512)[0]
    qkv = normal(rng, (len(batch.token_ids), (heads + 2 * kv_heads) * head_dim), dtype)
    given, uploaded = cuda.to_device(qkv), cuda.upload(batch)
    out = cuda.attention(given, uploaded, heads, kv_heads)
    assert_close(out, reference.attention(wide(qkv), batch, heads, kv_heads))
    capability, chosen = int(cupy.cuda.Device().compute_capability), cuda.attention_portable
    if capability >= 80 and dtype.itemsize == 2:
        hopper = capability == 90 and head_dim in (64, 128)
        chosen = cuda.attention_sm90 if hopper else cuda.attention_mma
    assert_same_bits(chosen(given, uploaded, heads, kv_heads), out)


def test_upload(rng):
    batch = forest(rng, 30, 100, 1024)[0]
    for device in [cuda.upload(batch) for _ in range(20)]:
        for name, array in vars(batch).items():
            np.testing.assert_array_equal(host(getattr(device, name)), array)
        planned = cuda.attention_arrays(batch, device.item_queries)
        for name, array in planned.items():
            np.testing.assert_array_equal(host(getattr(device, name)), array)
        assert device.items.data.ptr % 16 == device.steps.data.ptr % 16 == 0
        assert device.tiles.data.ptr % 8 == 0


def sequences(rng, *shapes, scattered=True):
    """Segments with keys in a cache, and how many slots there are.

    Args:
        scattered: the slots are in no order; else keys that are nobody else's lie side by side.
        shapes: of each its own tokens, the keys before them, and the segment that has these as its
            first; -1: they are in the cache already.
    """
    total = sum(own + past for own, past, _ in shapes) + 5
    slots = rng.permutation(total) if scattered else np.arange(total)
    slots = iter(slots.astype(np.int32))
    found = []
    for own, past, other in shapes:
        first = [next(slots) for _ in range(past)] if other < 0 else found[other].slots[:past]
        row = np.array([*first, *(next(slots) for _ in range(own))], np.int32)
        found.append(Segment([0] * own, past, row))
    return cached_batch(found), total


# Prompts alone; prefixes in common, within the pass and from before; neighbours that have as many
# keys before their own, and none of them in common.
CACHED = [
    [(1, 0, -1)],
    [(3, 0, -1), (65, 0, -1), (128, 0, -1), (1, 0, -1), (260, 0, -1)],
    [(300, 0, -1), (9, 256, 0), (5, 260, 1), (5, 64, -1), (5, 64, 3), (70, 300, 0), (1, 63, 0)],
    [(10, 200, -1), (10, 200, -1), (10, 200, 1), (10, 200, 0), (10, 130, 3), (1, 131, 2)],
    [(1, 4095, -1), (1, 1, -1), (1, 64, -1), (1, 127, -1), (1, 128, -1), (130, 3900, 0)],
]


@every_dtype
@pytest.mark.parametrize("shapes", CACHED)
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("head_dim", [62, 64, 80, 128, 256])
def test_attention_over_a_cache(rng, dtype, head_dim, scattered, shapes):
    """Every kernel against float64, its cache holding NaN where no key is."""
    if dtype == BF16 and head_dim not in (64, 128):
        pytest.skip("as float16")
    if not scattered and head_dim not in (64, 128):
        pytest.skip("as scattered")
    heads, kv_heads = HEADS[head_dim]
    batch, slots = sequences(rng, *shapes, scattered=scattered)
    qkv = normal(rng, (len(batch.token_ids), (heads + 2 * kv_heads) * head_dim), dtype, 1.5)
    before = np.full((slots, 2 * kv_heads * head_dim), np.nan, dtype)
    before[batch.key_index] = normal(rng, (len(batch.key_index), before.shape[1]), dtype)
    before[batch.slots] = np.nan  # what the pass puts there itself
    filled = before.copy()
    filled[batch.slots] = qkv[:, heads * head_dim :]

    given, cache = cuda.to_device(qkv), cuda.to_device(before)
    outs = {
        "chosen": host(cuda.attention(given, decode_cuda.upload(batch), heads, kv_heads, cache))
    }
    assert_same_bits(cache, filled)
    assert_same_bits(given, qkv)
    for name, launch in kernels_for(dtype, head_dim).items():
        outs[name] = launch(qkv, batch, heads, kv_heads, cache)
    assert_same_bits(cache, filled)
    for s in range(len(shapes)):
        first, last = batch.segment_start[s : s + 2]
        keys = filled[batch.key_index[batch.key_start[s] : batch.key_start[s + 1]]]
        q = qkv[first:last, : heads * head_dim].reshape(last - first, heads, head_dim)
        expected = attend(q, keys.reshape(len(keys), -1, head_dim))
        for name, out in outs.items():
            print(f"{name}, segment {s} of {len(shapes)}")
            assert_close(out[first:last], expected)


def attend(q, keys_and_values):
    """In float64: (queries, heads, head_dim), (keys, 2 · kv heads, head_dim) -> (queries, all)."""
    n, heads, head_dim = q.shape
    k = len(keys_and_values)
    keys, values = np.split(keys_and_values.astype(np.float64), 2, axis=1)
    q = q.astype(np.float64).reshape(n, keys.shape[1], -1, head_dim)
    scores = np.einsum("nhgd,khd->hgnk", q, keys) / np.sqrt(head_dim)
    scores[..., np.arange(k) > np.arange(k - n, k)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hgnk,khd->nhgd", weights, values).reshape(n, -1)


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 100, 128])
def test_cached_bits_are_those_of_packed_rows(rng, dtype, head_dim):
    """The same keys in the same order, wherever they lie."""
    heads, kv_heads = HEADS[head_dim]
    for shape, scattered in itertools.product(FORESTS, (True, False)):
        batch = forest(rng, *shape)[0]
        tokens = len(batch.token_ids)
        slots = rng.permutation(tokens + 30) if scattered else np.arange(30, tokens + 30)
        slots = slots.astype(np.int32)[:tokens]
        changes = {"key_index": slots[batch.key_index], "slots": slots}
        cached = CachedBatch(**(vars(batch) | changes))
        qkv = normal(rng, (tokens, (heads + 2 * kv_heads) * head_dim), dtype)
        nothing = np.full((tokens + 30, 2 * kv_heads * head_dim), np.nan, dtype)
        cache = cuda.to_device(nothing)
        cuda.attention(cuda.to_device(qkv), decode_cuda.upload(cached), heads, kv_heads, cache)
        for launch in kernels_for(dtype, head_dim).values():
            out = launch(qkv, cached, heads, kv_heads, cache)
            assert_same_bits(out, launch(qkv, batch, heads, kv_heads))


def test_upload_of_a_cached_batch(rng):
    batch, _ = sequences(rng, *CACHED[2])
    device = decode_cuda.upload(batch)
    for name, array in vars(batch).items():
        np.testing.assert_array_equal(host(getattr(device, name)), array)
    assert device.items.data.ptr % 16 == device.steps.data.ptr % 16 == 0
    assert device.tiles.data.ptr % 8 == 0
