"""What `cupyllama bench` and the scripts beside it refuse: no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cupyllama.cli import cli
from cupyllama.parallel import world


@pytest.fixture
def without_gpu():
    from cupyllama.parallel.devices import why_no_cuda

    if not why_no_cuda():
        pytest.skip("there is a GPU")


@pytest.mark.parametrize("command", ["kernels", "gemm", "score", "load"])
def test_no_gpu(without_gpu, command):
    result = CliRunner().invoke(cli, ["bench", command])
    assert result.exit_code == 5 and result.stdout == ""
    assert result.stderr.startswith("cupyllama: no usable GPU: ")
    assert len(result.stderr.strip().splitlines()) == 2  # and the hint


@pytest.mark.parametrize("script", ["pipeline_gpu", "link_gpu", "load_gpu"])
def test_no_gpu_for_a_script(script):
    pytest.importorskip("cupy")
    path = Path(__file__).parents[1] / "bench" / f"{script}.py"
    given = ["--data", "none", "--tokenizer", "none"] if script == "pipeline_gpu" else []
    command = [sys.executable, "-W", "ignore", str(path), *given]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("Error: no usable GPU: ")
    assert answer.stderr.endswith("`cupyllama doctor` says what is missing.\n")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--link-gbs", "--network-gbs"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "fast"])
def test_rates_that_no_link_has(option, value):
    result = CliRunner().invoke(cli, ["bench", "pipeline", "r.json", option, value])
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.stderr


@pytest.mark.parametrize("command", ["kernels", "gemm", "score", "load"])
def test_unknown_shapes(command):
    result = CliRunner().invoke(cli, ["bench", command, "--shape", "llama-8b"])
    assert result.exit_code == 2 and "'llama-8b' is not known" in result.stderr
    assert "llama-65b" in result.stderr and "opt-66b" in result.stderr


@pytest.mark.parametrize("command", ["kernels", "score"])
def test_what_a_bench_reads_is_not_written_over(command, tmp_path):
    data = tmp_path / "q.jsonl"
    data.write_text("{}")
    for written in ("--json", "--plot"):
        given = ["--data", data, "--tokenizer", tmp_path, written, data]
        result = CliRunner().invoke(cli, ["bench", command, *map(str, given)])
        assert result.exit_code == 2
        assert f"{written} and --data are the same file: {data}" in result.stderr
    assert data.read_text() == "{}"


def test_several_ranks_are_refused(monkeypatch):
    four = SimpleNamespace(size=4, together=world.open_world().together)
    monkeypatch.setattr(world, "open_world", lambda: four)
    shard = ["shard", "--model", "m", "--stages", "2", "--output", "o"]
    for command in (["bench", "score"], shard):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 2 and "there are 4 ranks" in result.stderr
