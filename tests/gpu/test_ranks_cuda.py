"""Ranks that share one GPU: CUDA IPC between them, and the bits of one process."""

import shutil

import pytest
from test_ranks import MPIRUN, mpirun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")]


def demo(*arguments) -> list:
    fixed = ["score", "--demo", "--micro-batch-tokens", "1024", "--device", "cuda"]
    return [*fixed, "--quiet", *arguments]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("alone") / "samples.jsonl"
    result = mpirun(1, *demo("--samples", path))
    assert result.returncode == 0, result.stderr
    return path.read_text()


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (4, 1), (4, 2)])
def test_ranks_on_one_gpu_give_the_same_bits(ranks, replicas, alone, tmp_path):
    samples = tmp_path / "samples.jsonl"
    result = mpirun(ranks, *demo("--replicas", replicas, "--samples", samples))
    assert result.returncode == 0, result.stderr
    assert samples.read_text() == alone


def test_resume_on_the_gpu(alone, tmp_path):
    """A journal that was cut short in the middle of a line."""
    samples = tmp_path / "samples.jsonl"
    journal = samples.with_name("samples.jsonl.partial")
    killed = mpirun(2, *demo("--samples", samples), fault=("-1", "none", "0"))
    assert killed.returncode == 0, killed.stderr
    shutil.move(samples, tmp_path / "whole.jsonl")
    # begin again, and break off by a fault on the CPU's side of rank 0: a full disk
    mpirun(2, *demo("--samples", samples), fault=("0", "full-disk", "load"))
    assert journal.exists() and not samples.exists()
    again = mpirun(4, *demo("--samples", samples, "--resume"))
    assert again.returncode == 0, again.stderr
    assert samples.read_text() == alone
