"""How products of few rows are cut fits what their kernels demand, without a GPU."""

import re
from importlib import resources

import pytest

from cupyllama import kernels
from cupyllama.kernels import definitions

# Of models from 125M to 175B, whole and cut for several ranks, and the least that there is.
KS = (16, 48, 512, 768, 1024, 3072, 4096, 5504, 6656, 7168, 9216, 11008, 17920, 28672, 49152)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shared_kib", [99, 163, 227])
def test_gemv_constants(eight_bit, rows, shared_kib):
    for k in KS:
        c = definitions.gemv_constants(
            "FP16", eight_bit, rows, k, "PLAIN", False, shared_kib * 1024
        )
        threads = 32 * c["K_WARPS"] * c["GROUPS"]
        assert rows <= c["TOKENS"] and c["BAND"] * c["TOKENS"] <= threads <= 1024, c
        assert c["DEPTH"] >= 2 and c["BAND"] >= c["GROUPS"], c
        assert definitions.gemv_shared_bytes(c) <= shared_kib * 1024, c


@pytest.mark.parametrize("k", [4096, 7168, 28672, 6656, 17920, 11008])
def test_gemv_leaves_few_warps_idle(k):
    """What warps have beyond k they do not read, but others then read more slowly."""
    for eight_bit in (False, True):
        c = definitions.gemv_constants("FP16", eight_bit, 1, k, "PLAIN", False, 227 * 1024)
        units = -(-k * (2 - eight_bit) // 512)
        at_once = c["K_WARPS"] * c["SLICE"]
        assert -(-units // at_once) * at_once <= 1.13 * units, c
        assert c["K_WARPS"] * c["GROUPS"] >= 7, c


@pytest.mark.parametrize("shared_kib, most", [(99, 64), (163, 128), (227, 128)])
def test_tiles_fit_or_are_refused(shared_kib, most):
    for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129):
        c = definitions.few_rows_constants("FP16", rows, "PLAIN", False, shared_kib * 1024)
        assert (c is None) == (rows > most), (rows, c)
        if c is not None:
            assert rows <= c["TOKENS"] and c["STAGES"] >= 2, c
            assert definitions.few_rows_shared_bytes(c) <= shared_kib * 1024, c


@pytest.mark.parametrize("rows", [5, 16, 17, 32, 33, 64, 65, 128])
def test_tiles_by_wgmma_fit(rows):
    c = definitions.few_rows_sm90_constants("FP16", rows, "PLAIN", False)
    # A box of the copy engine has at most 256 rows, a phase of a barrier less than 2^20 bytes.
    assert rows <= c["TOKENS"] <= 256 and c["TOKENS"] % 16 == 0, c
    assert c["STAGES"] >= 3, c
    assert (definitions.FEW_ROWS_SM90_TILE + 2 * c["TOKENS"]) * 128 < 1 << 20, c
    assert definitions.few_rows_sm90_shared_bytes(c) <= 227 * 1024, c


def test_tiles_by_wgmma_are_those_of_the_kernel():
    text = resources.files(kernels).joinpath("few_rows_sm90.cu").read_text(encoding="utf-8")
    number = {name: int(value) for name, value in re.findall(r"int (\w+) = (\d+);", text)}
    assert 64 * number["WARPGROUPS"] == definitions.FEW_ROWS_SM90_TILE
    assert number["STAGE"] == definitions.FEW_ROWS_SM90_STAGE


@pytest.mark.parametrize("places", [3, 114, 132])
@pytest.mark.parametrize("n", [1, 256, 7168, 20000, 28672, 50272, 22016])
def test_blocks_of_tiles_by_wgmma(places, n):
    few_rows_sm90 = pytest.importorskip("cupyllama.ops.few_rows_sm90")
    tiles = -(-n // 256)
    for k in KS:
        stages = -(-k // 128)
        blocks = few_rows_sm90._blocks(places, tiles, stages)
        # Each has work, and more than half of the device has some, as far as there is work.
        assert 0 < blocks <= min(places, tiles * stages), (n, k, blocks)
        assert 2 * blocks > min(places, tiles * stages), (n, k, blocks)
        # No tile is of more blocks than it must, or all have as much.
        assert blocks % tiles == 0 or blocks == places < tiles, (n, k, blocks)
