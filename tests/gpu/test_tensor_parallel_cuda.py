"""Matrices shared by ranks on GPUs: the operations of a group, and the answers of one rank."""

import json
import threading
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from device_arrays import assert_same_bits, cuda, every_dtype, host, normal
from test_ranks import MPIRUN, mpirun

from cupyllama.config import Share
from cupyllama.ops import reference

pytestmark = pytest.mark.gpu


@every_dtype
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 331, 8 * 4099])
def test_sum_parts(rng, dtype, ranks, count, poison):
    parts = normal(rng, (ranks, count), dtype)
    for rank in {0, ranks // 2, ranks - 1}:
        received = parts.copy()
        received[rank] = np.nan
        own, expected = cuda.to_device(parts[rank].copy()), parts[rank].copy()
        cuda.sum_parts(own, cuda.to_device(received), rank)
        reference.sum_parts(expected, received, rank)
        assert_same_bits(own, expected)


@pytest.mark.parametrize(("vocab", "ranks"), [(331, 3), (32000, 4), (50272, 2)])
def test_log_probs_of_parts_are_those_of_the_whole(rng, vocab, ranks, poison):
    rows = 70
    logits = (5 * rng.standard_normal((rows, vocab))).astype(np.float32)
    logits[0] += 1e4
    logits[1, [3, vocab // 2, vocab - 1]] = 50
    logits[2], logits[2, vocab - 1] = -np.inf, 1
    logits[3, vocab // 2] = np.nan
    counts = rng.integers(0, 4, rows)
    counts[:4] = 3
    start = np.concatenate([[2], 2 + np.cumsum(counts)]).astype(np.int32)
    token = rng.integers(0, vocab, start[-1] + 1).astype(np.int32)
    token[start[1] : start[1] + 2] = 3, vocab - 1
    expected = np.full((2, len(token)), 7, np.float32)
    reference.log_probs(logits, start, token, expected)
    targets = cuda.to_device(start), cuda.to_device(token)
    parts = cuda.empty((ranks, 4, len(token)), np.float32)
    out = cuda.to_device(np.full((2, len(token)), 7, np.float32))
    for rank in range(ranks):
        own = Share(rank, ranks).vocabulary(vocab)
        part = cuda.to_device(logits[:, own.start : own.stop].copy())
        cuda.log_probs_part(part, *targets, own.start, parts[rank])
    cuda.join_log_probs(parts, *targets, out)
    found = host(out)
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1, start[1]] == 1 and found[1, start[1] + 1] == 0
    exact = np.full(len(token), 7, np.float64)
    wide = logits.astype(np.float64)
    for row, (first, last) in enumerate(pairwise(start)):
        peak = wide[row].max()
        total = peak + np.log(np.exp(wide[row] - peak).sum())
        exact[first:last] = wide[row, token[first:last]] - total
    np.testing.assert_allclose(found[0], exact, rtol=2e-6, atol=1e-5)
    assert np.isnan(found[0, start[3] : start[4]]).all()


class Pair:
    """Two threads on one GPU: what `NCCLExchange` does, by copies."""

    def __init__(self):
        self.barrier, self.sent = threading.Barrier(2), [None, None]

    def exchange(self, rank):
        def exchange(outgoing, incoming):
            cuda.synchronize()
            self.sent[rank] = outgoing
            self.barrier.wait(60)
            incoming[1 - rank][...] = self.sent[1 - rank][rank]
            cuda.synchronize()
            self.barrier.wait(60)

        return exchange


@every_dtype
def test_sums_of_a_group_do_not_depend_on_the_place(rng, dtype):
    from unittest import mock

    from cupyllama.parallel.group import Group

    parts = normal(rng, (2, 40, 264), dtype)
    order = rng.permutation(40)
    expected = (parts[0].astype(np.float32) + parts[1].astype(np.float32)).astype(dtype)
    for rows, wanted in ((parts, expected), (parts[:, order], expected[order])):
        pair, found = Pair(), [None, None]

        def work(rank, rows=rows, pair=pair, found=found):
            config = mock.Mock(vocab_size=1000, share=Share(rank, 2))
            group = Group(cuda, config, pair.exchange(rank))
            found[rank] = group.sum(cuda.to_device(rows[rank].copy()))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for array in found:
            assert_same_bits(array, wanted)


def scored(ranks, folder, *arguments):
    samples = folder / f"{ranks}.jsonl"
    fixed = ["score", "--demo", "--micro-batch-tokens", "1024", "--device", "cuda", "--quiet"]
    result = mpirun(ranks, *fixed, "--samples", samples, *arguments)
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, samples.read_text().splitlines())
    return np.array([value for line in lines for value in line["loglikelihoods"]])


@pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")
@pytest.mark.parametrize(("ranks", "size"), [(2, 2), (4, 2), (4, 4)])
def test_a_group_finds_what_one_rank_finds(ranks, size, tmp_path):
    """On as many GPUs as there are: through the host's memory where ranks share one."""
    exact = scored(1, tmp_path, "--dtype", "float32")
    found = scored(ranks, tmp_path, "--dtype", "float32", "--tensor-parallel", size)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)
    half = scored(1, tmp_path, "--dtype", "float16")
    found = scored(ranks, tmp_path, "--dtype", "float16", "--tensor-parallel", size)
    assert np.abs(found - exact).mean() < 2 * np.abs(half - exact).mean()


def test_bfloat16_crosses_the_host(rng):
    """As bytes: MPI knows no such type."""
    from cupyllama.parallel.cuda_group import HostExchange

    class Echo:
        """A peer that sends back what it is sent."""

        rank = 0

        def Isend(self, array, peer, tag):
            self.sent = array
            return self

        def Irecv(self, array, peer, tag):
            self.received = array
            return self

        def Test(self):
            self.received[:] = self.sent
            return True

    x = cuda.to_device(normal(rng, (3, 8), np.dtype(ml_dtypes.bfloat16)))
    out = cuda.to_device(np.zeros((3, 8), ml_dtypes.bfloat16))
    HostExchange(Echo(), range(2))([x, x], [out, out])
    assert_same_bits(out, x)
