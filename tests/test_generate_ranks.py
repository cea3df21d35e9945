"""Several ranks under mpirun on the CPU generate what one does, and end together."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_ranks import MPIRUN, our_lines
from test_ranks import pytestmark as pytestmark
from tiny_generation import generating_config, write_generating_model
from tiny_tokenizer import write_tokenizer

GENERATING_RANK = Path(__file__).with_name("generating_rank.py")
RECORDED = json.loads((Path(__file__).parent / "data" / "transformers_generate.json").read_text())
NAMES = ["gqa", "opt_varied"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directories of the models, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        directory = write_generating_model(name, folder / name)
        write_tokenizer(directory, generating_config(name)["vocab_size"])
    return folder


def generating(
    ranks: int, folder: Path, name: str, tensor_parallel: int, *fault, on=("cpu", "float32")
):
    """`generating_rank.py` in so many processes, on a device in a dtype."""
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", ranks, sys.executable]
    command += [GENERATING_RANK, folder / name, name, *on, tensor_parallel, *fault]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, errors="replace", timeout=120
    )


@pytest.fixture(scope="module")
def alone(models):
    """What one process says of each model."""
    command = [sys.executable, GENERATING_RANK]
    return {
        name: json.loads(
            subprocess.run(
                [*command, models / name, name, "cpu", "float32", "1"],
                check=True,
                capture_output=True,
            ).stdout
        )[0]
        for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_one_process_says_what_transformers_does(name, alone):
    recorded, found = RECORDED["models"][name], alone[name]
    assert found["greedy"] == recorded["greedy"]
    expected = recorded["beams"][0]
    assert expected["prompt"] == 0 and not expected["eos"]
    assert found["beams"] == [one["tokens"] for one in expected["hypotheses"]]
    assert [len(text) for text in found["drawn"]] == [30, 9, 30, 30, 30]


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4), (4, 2)]
)
@pytest.mark.parametrize("name", NAMES)
def test_worlds_generate_the_same(name, ranks, tensor_parallel, models, alone):
    """Every rank has all tokens, with stages, with shared matrices, and with both."""
    result = generating(ranks, models, name, tensor_parallel)
    assert result.returncode == 0, result.stderr
    everyone = json.loads(result.stdout)
    stages = ranks // tensor_parallel
    assert len(everyone) == ranks
    assert len({tuple(found.pop("layers")) for found in everyone}) == stages
    expected = {key: value for key, value in alone[name].items() if key != "layers"}
    assert everyone == [expected] * ranks


@pytest.mark.parametrize(
    ("rank", "fault", "tensor_parallel"),
    [(2, "kill", 1), (0, "kill", 2), (3, "kill", 4), (1, "raise", 1)],
)
def test_a_fault_in_mid_answer_ends_all(rank, fault, tensor_parallel, models):
    begin = time.monotonic()
    result = generating(4, models, "gqa", tensor_parallel, rank, fault, 20)
    assert time.monotonic() - begin < 30  # start and loading included
    said = our_lines(result)
    reason = {"kill": "was killed or crashed", "raise": "RuntimeError: a fault for the test"}
    assert len(said) == 1 and said[0].endswith(f"rank {rank}: {reason[fault]}"), result.stderr
    # Open MPI ends with what it makes of the first process that failed: 128 + SIGKILL, not ours.
    assert result.returncode in ((6, 137) if fault == "kill" else (6,))
    assert result.stdout == ""
