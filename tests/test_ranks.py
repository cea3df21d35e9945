"""Several ranks under mpirun on the CPU: the same bits as one, and one end for all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import TINY_MODELS, write_tiny_model
from tiny_tokenizer import write_tokenizer

pytest.importorskip("mpi4py")
MPIRUN = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which("mpirun")
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")

FAULTY_RANK = Path(__file__).with_name("faulty_rank.py")
LIMIT = "160"  # questions of the demo: 15 micro-batches


def start(ranks: int, *arguments, fault=("-1", "none", "0"), **options) -> subprocess.Popen:
    """`mpirun -n ranks cupyllama …`, with a fault in one of the ranks."""
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", ranks, sys.executable]
    command += [FAULTY_RANK, *fault, "--", *arguments]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        **options,
    )


def mpirun(ranks: int, *arguments, fault=("-1", "none", "0")) -> subprocess.CompletedProcess:
    process = start(ranks, *arguments, fault=fault)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def our_lines(result: subprocess.CompletedProcess) -> list[str]:
    """What we say on stderr, apart from the launcher's words, one of which ends in a zero byte."""
    lines = result.stderr.replace("\0", "").splitlines()
    return [line for line in lines if line.startswith("cupyllama: ")]


def demo(*arguments) -> list:
    fixed = ["score", "--demo", "--limit", LIMIT, "--micro-batch-tokens", "1024"]
    return [*fixed, "--device", "cpu", "--quiet", *arguments]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    """The samples file of one process."""
    path = tmp_path_factory.mktemp("alone") / "samples.jsonl"
    command = [sys.executable, "-m", "cupyllama", *demo("--samples", path)]
    subprocess.run(command, check=True, capture_output=True)
    return path.read_text()


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (4, 1), (4, 2), (2, 2)])
def test_worlds_give_the_same_bits(ranks, replicas, alone, tmp_path):
    samples, output = tmp_path / "samples.jsonl", tmp_path / "results.json"
    arguments = ["--replicas", replicas, "--samples", samples, "--output", output]
    trace = tmp_path / "trace.json"
    result = mpirun(ranks, *demo(*arguments, "--trace", trace))
    assert result.returncode == 0, result.stderr
    assert samples.read_text() == alone
    assert result.stdout.count("acc_norm") == 1  # one rank prints
    report = json.loads(output.read_text())
    stages = ranks // replicas
    assert (report["config"]["replicas"], report["config"]["stages"]) == (replicas, stages)
    seen = [rank["layers"] for rank in report["cupyllama"]["ranks"]]
    assert [first for first, _ in seen[1:stages]] == [last for _, last in seen[: stages - 1]]
    assert seen == seen[:stages] * replicas
    assert all(0 < rank["busy"] <= 1 for rank in report["cupyllama"]["ranks"])
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["pid"] for event in events} == set(range(ranks))
    kinds = {event["name"].split()[0] for event in events if event["ph"] == "X"}
    assert kinds == {"tokenise", "load", "compute"} | ({"receive", "send"} if stages > 1 else set())
    assert not samples.with_name("samples.jsonl.partial").exists()


def test_a_replica_may_have_nothing_to_do(tmp_path):
    """One micro-batch for two replicas."""
    few = ["--limit", "5", "--micro-batch-tokens", "4096", "--samples"]
    first = mpirun(1, *demo(*few, tmp_path / "1.jsonl"))
    assert first.returncode == 0, first.stderr
    second = mpirun(4, *demo(*few, tmp_path / "4.jsonl", "--replicas", "2"))
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "4.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()


def test_sharded_checkpoints_give_the_same_bits(alone, tmp_path):
    """Made for three stages, scored on two and on four."""
    from click.testing import CliRunner

    from cupyllama.cli import cli
    from cupyllama.tasks.files import demo_directory

    sharded = tmp_path / "sharded"
    arguments = ["--model", demo_directory(), "--stages", 3, "--output", sharded, "--quiet"]
    made = CliRunner().invoke(cli, ["shard", *map(str, arguments)])
    assert made.exit_code == 0, made.output
    data = ["--data", demo_directory() / "questions.jsonl", "--model", sharded]
    for ranks in (2, 4):
        samples = tmp_path / f"{ranks}.jsonl"
        arguments = [argument for argument in demo("--samples", samples) if argument != "--demo"]
        result = mpirun(ranks, *arguments, *data)
        assert result.returncode == 0, result.stderr
        assert samples.read_text() == alone
    (sharded / "stage-01-of-03.safetensors").unlink()
    ends(mpirun(2, *arguments, *data), 3, "stage-01-of-03.safetensors")


def test_predictions_for_more_ranks(tmp_path):
    from click.testing import CliRunner

    from cupyllama.cli import cli

    output = tmp_path / "results.json"
    result = mpirun(2, *demo("--output", output))
    assert "; simulated " in result.stdout
    extra = json.loads(output.read_text())["cupyllama"]
    first, second = extra["ranks"]
    assert first["link_seconds"] is None and 0 < second["link_seconds"] < 1
    # two ranks on two cores: the schedule explains most of the time
    assert 0.4 * extra["seconds"]["evaluating"] < extra["simulated_seconds"]
    assert extra["simulated_seconds"] < 1.2 * extra["seconds"]["evaluating"]
    shown = CliRunner().invoke(cli, ["bench", "pipeline", str(output), "--ranks-per-host", "2"])
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.output.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "4"]  # the demo has six layers
    assert [row[1] for row in rows] == ["1", "1", "2"]
    assert float(rows[1][3]) > 1.5 * float(rows[0][3])
    wrong = CliRunner().invoke(cli, ["bench", "pipeline", str(output.with_name("no.json"))])
    assert wrong.exit_code == 4 and "No such file" in wrong.stderr


def test_each_rank_reads_its_own_layers(tmp_path):
    output = tmp_path / "results.json"
    mpirun(3, *demo("--output", output))
    ranks = json.loads(output.read_text())["cupyllama"]["ranks"]
    size = (Path(__file__).parents[1] / "cupyllama/tasks/demo/model.safetensors").stat().st_size
    embedding = 1000 * 128 * 2  # tied: the first and the last rank read it
    assert sum(rank["bytes_read"] for rank in ranks) - embedding == pytest.approx(size, abs=10_000)
    assert max(rank["bytes_read"] for rank in ranks) < 0.45 * size


FAULTS = [
    # rank, fault, when, exit code, what is said
    ("2", "kill", "load", 6, "rank 2: was killed or crashed"),
    ("1", "kill", "0", 6, "rank 1: was killed or crashed"),
    ("3", "kill", "6", 6, "rank 3: was killed or crashed"),
    ("0", "kill", "6", 6, "rank 0: was killed or crashed"),
    ("2", "raise", "load", 6, "rank 2: RuntimeError: a fault for the test"),
    ("2", "raise", "6", 6, "rank 2: RuntimeError: a fault for the test"),
    ("1", "interrupt", "6", 130, "rank 1: interrupted"),
    ("0", "terminate", "6", 143, "cupyllama: ended by the launcher"),
    ("0", "stuck", "6", 143, "cupyllama: ended by the launcher"),
    ("0", "full-disk", "6", 1, "samples.jsonl.partial: cannot be written: File too large"),
]


@pytest.mark.parametrize(("rank", "fault", "when", "exit_code", "message"), FAULTS)
def test_a_fault_ends_all_and_resume_completes(
    rank, fault, when, exit_code, message, alone, tmp_path
):
    samples = tmp_path / "samples.jsonl"
    begin = time.monotonic()
    result = mpirun(4, *demo("--samples", samples), fault=(rank, fault, when))
    assert time.monotonic() - begin < 30  # start and loading included
    assert not samples.exists()
    said = our_lines(result)
    assert len(said) == 1 and said[0].endswith(message), result.stderr
    if fault in ("kill", "interrupt", "terminate", "stuck"):
        assert "\n  With --samples, --resume goes on from there.\n" in result.stderr
    # Open MPI ends with what it makes of the first process that failed: 128 + SIGKILL, not ours.
    assert result.returncode in ((exit_code, 137) if fault == "kill" else (exit_code,))
    again = mpirun(2, *demo("--samples", samples, "--resume"))
    assert again.returncode == 0, again.stderr
    assert samples.read_text() == alone
    assert os.listdir(tmp_path) == ["samples.jsonl"]


def test_a_file_that_cannot_be_written_costs_no_answers(tmp_path):
    samples, few = tmp_path / "s.jsonl", ["--limit", "20", "--micro-batch-tokens", "256"]
    few = ["score", "--demo", "--device", "cpu", *few, "--samples", samples, "--trace"]
    result = mpirun(2, *few, "/dev/full")
    assert result.returncode == 1 and result.stdout.count("* acc_norm") == 1
    said = our_lines(result)
    assert len(said) == 1 and "/dev/full: cannot be written: No space" in said[0], result.stderr
    kept = f"answers are kept in {samples}.partial: --resume goes on after a break"
    assert kept in result.stderr.splitlines()
    again = mpirun(2, *few, tmp_path / "t.json", "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[4:8] == result.stdout.splitlines()[4:8]
    nothing = mpirun(2, *few, tmp_path / "t.json", "--resume")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert len(said := our_lines(nothing)) == 1 and "s.jsonl: is finished" in said[0]
    assert sorted(os.listdir(tmp_path)) == ["s.jsonl", "t.json"]


def test_interrupting_the_launcher_leaves_nobody(tmp_path):
    slow = ["--limit", "400", "--micro-batch-tokens", "100", "--samples", tmp_path / "s.jsonl"]
    process = start(3, *demo(*slow), start_new_session=True)
    time.sleep(3)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0 and time.monotonic() - begin < 10
    assert not (tmp_path / "s.jsonl").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model of three layers, its tokenizer and questions."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(write_tiny_model("llama1", folder / "model"))
    lines = [json.dumps({"query": f"the {i}", "choices": ["man", "tea"], "gold": 0}) for i in "abc"]
    (folder / "q.jsonl").write_text("\n".join(lines))
    return folder


def score_tiny(folder: Path, *arguments) -> list:
    fixed = ["score", "--model", folder / "model", "--device", "cpu", "--quiet"]
    return [*fixed, "--data", folder / "q.jsonl", *arguments]


def ends(result: subprocess.CompletedProcess, exit_code: int, message: str) -> None:
    """All ranks left with the code, and one of them said why, once."""
    assert result.returncode == exit_code, result.stderr
    said = our_lines(result)
    assert len(said) == 1 and message in said[0], result.stderr
    assert result.stdout == ""


def test_wrong_input_is_said_once(tiny, tmp_path):
    ends(mpirun(4, *score_tiny(tiny)), 2, "4 stages cannot share the model's 3 layers")
    ends(mpirun(3, *score_tiny(tiny, "--replicas", 2)), 2, "3 ranks cannot be 2 replicas")
    wrong = mpirun(2, *score_tiny(tiny, "--layers-per-stage", "1,1"))
    ends(wrong, 2, "--layers-per-stage 1,1 does not share 3 layers")
    ends(mpirun(2, *score_tiny(tmp_path)), 3, "no such directory")
    copy = shutil.copytree(tiny, tmp_path / "copy")
    weights = copy / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ends(mpirun(2, *score_tiny(copy)), 3, "truncated or corrupt")


def test_layers_per_stage(tiny, tmp_path):
    output = tmp_path / "r.json"
    result = mpirun(2, *score_tiny(tiny, "--layers-per-stage", "1,2", "--output", output))
    assert result.returncode == 0, result.stderr
    ranks = json.loads(output.read_text())["cupyllama"]["ranks"]
    assert [rank["layers"] for rank in ranks] == [[0, 1], [1, 3]]


@pytest.mark.parametrize(
    ("name", "quantize"), [("opt", "fp8"), ("opt_350m", "none"), ("opt_350m", "int8")]
)
def test_opt_has_the_same_bits_on_several_ranks(name, quantize, tmp_path):
    model = write_tiny_model(name, tmp_path / "model")
    write_tokenizer(model, TINY_MODELS[name]["vocab_size"])
    questions = ({"query": f"the man {i}", "choices": list("abc"), "gold": 0} for i in range(40))
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    arguments = ["--quantize", quantize, "--micro-batch-tokens", 64, "--samples"]
    found = []
    for ranks in (1, 3):
        samples = tmp_path / f"{ranks}.jsonl"
        result = mpirun(ranks, *score_tiny(tmp_path, *arguments, samples))
        assert result.returncode == 0, result.stderr
        found.append(samples.read_text())
    assert found[0] == found[1] and found[0].count("loglikelihoods") == 40


def test_ranks_that_see_different_questions(tiny, tmp_path):
    """Each rank has a folder of its own, and reads q.jsonl there."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        shutil.copy(tiny / "q.jsonl", tmp_path / str(rank))
    other = {"query": "roof", "choices": ["man", "tea"], "gold": 0}
    (tmp_path / "2" / "q.jsonl").write_text(json.dumps(other))
    run = f"import os; os.chdir({str(tmp_path)!r} + '/' + os.environ['OMPI_COMM_WORLD_RANK'])\n"
    run += "from cupyllama.cli import cli; cli()"
    command = [
        MPIRUN,
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "3",
        sys.executable,
        "-c",
        run,
    ]
    command += score_tiny(tiny)
    command[command.index("--data") + 1] = "q.jsonl"
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    ends(result, 4, "rank 2 and rank 0 differ in: token rows")


def test_dry_run_plans_for_every_rank(tiny):
    result = mpirun(3, *score_tiny(tiny, "--dry-run"))
    assert result.returncode == 0, result.stderr
    for part in ("rank 0: layers 0 to 0", "rank 2: layers 2 to 2", "bubble"):
        assert result.stdout.count(part) == 1
