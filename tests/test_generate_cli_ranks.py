"""`cupyllama generate` in several ranks under mpirun: the answers of one, and one end for all."""

import os
import signal
import subprocess
import sys
import time

import pytest
from generate_command import PROMPTS, records_of, text_of, text_of_file
from generate_command import prompts_file as prompts_file
from test_ranks import MPIRUN, our_lines
from test_ranks import pytestmark as pytestmark

FAULT = """
import os, signal
from cupyllama.ops import decode_reference
if os.environ["OMPI_COMM_WORLD_RANK"] == "{rank}":
    steps, step = iter(range(100)), decode_reference.Decoder.step
    def faulty(self, positions):
        if next(steps) == 5:
            {fault}
        return step(self, positions)
    decode_reference.Decoder.step = faulty
"""
KILL, RAISE = "os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('a fault for the test')"


def mpirun_command(ranks, *arguments, fault=""):
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", ranks, sys.executable, "-c"]
    command += [fault + "\nfrom cupyllama.cli import cli; cli()", "generate", "--demo", "--device"]
    return list(map(str, [*command, "cpu", *arguments]))


def mpirun(ranks, *arguments, fault=""):
    result = subprocess.run(
        mpirun_command(ranks, *arguments, fault=fault),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
    )
    result.said = our_lines(result)
    return result


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, []), (3, []), (2, ["--tensor-parallel", 2]), (4, ["--tensor-parallel", 2])],
)
def test_ranks_answer_as_one_does(ranks, options, prompts_file, tmp_path):
    more = [
        "--prompts",
        prompts_file,
        "--max-new-tokens",
        16,
        "--batch-size",
        3,
        "--stop",
        " small",
    ]
    expected = text_of_file(*more, path=tmp_path / "1.jsonl")
    result = mpirun(ranks, *more, *options, "--output", tmp_path / "n.jsonl")
    assert result.returncode == 0, result.stderr
    assert records_of(tmp_path / "n.jsonl") == expected
    assert result.stderr.count("tokens/s") == 1


def test_rank_0_reads_lines_for_all():
    command = mpirun_command(2, "--max-new-tokens", 8)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="surrogateescape",
        bufsize=1,
        start_new_session=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    ) as process:
        for line, part in [
            (PROMPTS[2], text_of("--prompt", PROMPTS[2], "--max-new-tokens", 8)),
            ("", None),
            # A line that is no text takes none of those behind it with it.
            ("caf\udce9\n" + PROMPTS[3], text_of("--prompt", PROMPTS[3], "--max-new-tokens", 8)),
            ("the man " * 300, "this line: the prompt 'the man"),
            (PROMPTS[1], text_of("--prompt", PROMPTS[1], "--max-new-tokens", 8)),
        ]:
            process.stdin.write(line + "\n")
            while part and part not in process.stdout.readline():
                pass
        process.send_signal(signal.SIGINT)  # Open MPI 5 does not hand on the end of its stdin
        assert process.wait(timeout=20)


def test_one_rank_says_that_it_waits_for_the_end_of_stdin():
    """Under Open MPI 5 it waits for ever."""
    with subprocess.Popen(
        mpirun_command(1),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while "reading stdin to its end" not in (line := process.stderr.readline()):
            assert line
        assert "--prompts FILE" in line
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20)


BROKEN = """
from cupyllama.ops import decode_reference
begin = decode_reference.Decoder.__init__
def broken(self, stage, *others):
    if stage.is_last:
        stage.weights.norm[0] = float("nan")
    begin(self, stage, *others)
decode_reference.Decoder.__init__ = broken
"""


@pytest.mark.parametrize("more", [[], ["--tensor-parallel", 2], ["--beam-width", 2]])
def test_logits_that_are_no_numbers_are_said_once(more, prompts_file):
    result = mpirun(2, "--prompts", prompts_file, *more, fault=BROKEN)
    place = f"{prompts_file}, line 1"
    assert result.said == [f"cupyllama: {place}: the logits of new token 1 are NaN or infinite"]
    assert result.returncode == 3 and result.stdout == ""


@pytest.mark.parametrize(
    ("rank", "fault", "exit_codes", "message"),
    [
        (0, KILL, (6, 137), "rank 0: was killed or crashed"),
        (1, KILL, (6, 137), "rank 1: was killed or crashed"),
        (1, RAISE, (6,), "rank 1: RuntimeError: a fault for the test"),
    ],
)
def test_a_rank_that_ends_in_mid_answer_ends_all(rank, fault, exit_codes, message):
    begin = time.monotonic()
    result = mpirun(2, "--prompt", PROMPTS[0], fault=FAULT.format(rank=rank, fault=fault))
    assert time.monotonic() - begin < 30
    assert result.returncode in exit_codes
    assert result.said == [f"cupyllama: {message}"], result.stderr


def test_a_rank_that_is_killed_in_mid_run_leaves_what_is_whole(prompts_file, tmp_path):
    prompts_file.write_text("A dog\nShe pours\nThe man on\n")
    path = tmp_path / "out.jsonl"
    fault = FAULT.replace("== 5", "== 60").format(rank=1, fault=KILL)
    result = mpirun(2, "--prompts", prompts_file, "--output", path, fault=fault)
    assert result.said == ["cupyllama: rank 1: was killed or crashed"], result.stderr
    assert f"\n  Answers that were whole, if any, are in {path}.partial.\n" in result.stderr
    found = [record["prompt"] for record in records_of(tmp_path / "out.jsonl.partial")]
    assert found == ["She pours", "The man on"]


def test_wrong_input_is_said_once(prompts_file):
    for arguments, code, message in [
        (["--prompts", prompts_file.with_name("no.txt")], 4, "no.txt: No such file"),
        (["--prompt", "a", "--max-new-tokens", 600], 4, "would pass the model's 512"),
        (["--prompt", "a", "--stop", ""], 2, "--stop '' is empty"),
        (["--prompt", "a", "--tensor-parallel", 3], 2, "2 ranks cannot be"),
    ]:
        result = mpirun(2, *arguments)
        assert result.returncode == code, result.stderr
        assert len(result.said) == 1 and message in result.said[0] and result.stdout == ""
