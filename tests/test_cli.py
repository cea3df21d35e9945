"""The command line as a user meets it: results, files, exit codes, one-line errors."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny_generation import write_overflowing_model
from tiny_models import write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.cli import cli

QUESTIONS = [
    {"query": "She pours the", "choices": ["tea.", "roof.", "snow."], "gold": 0},
    {"query": "The man on the roof", "choices": ["is removing shingles.", "jumps."], "gold": 0},
    {"query": "A lady walks to a", "choices": ["barbell.", "canoe.", "mat.", "cup."], "gold": 1},
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A tiny model with its tokenizer, and three questions."""
    folder = tmp_path_factory.mktemp("cli")
    write_tokenizer(write_tiny_model("gqa", folder / "model"))
    (folder / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(pristine, tmp_path / "work")


def score(folder, *arguments, model="model", data="q.jsonl"):
    fixed = ["--model", folder / model, "--data", folder / data, "--device", "cpu", "--quiet"]
    return CliRunner().invoke(cli, ["score", *map(str, [*fixed, *arguments])])


def fails(result, exit_code, *parts):
    """One line and a hint on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    for part in parts:
        assert str(part) in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().split("\n")) <= 2


def test_results_and_samples(folder):
    output, samples = folder / "results.json", folder / "samples.jsonl"
    result = score(folder, "--output", output, "--samples", samples)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2]
    assert [len(line["loglikelihoods"]) for line in lines] == [3, 2, 4]
    assert list(lines[0]) == [
        *("doc_id", "gold", "loglikelihoods", "num_tokens", "is_greedy", "pred", "pred_norm")
    ]
    report = json.loads(output.read_text())
    right = [int(np.argmax(line["loglikelihoods"])) == line["gold"] for line in lines]
    assert report["results"]["q"]["acc,none"] == pytest.approx(np.mean(right))
    assert report["n-samples"] == {"q": {"original": 3, "effective": 3}}
    config, extra = report["config"], report["cupyllama"]
    assert (config["convention"], config["bos"], config["dtype"]) == ("lm-eval", True, "float32")
    assert set(extra["digests"]) == {"model", "tokenizer", "data"}
    assert extra["tokens_asked"] > extra["tokens_computed"] > 0
    for part in ("q: 3 questions", "acc_norm", "acc_tokens", "tokens asked", "s loading"):
        assert part in result.stdout


def test_lm_evals_spellings(folder):
    arguments = ["--output_path", folder / "out.json", "--log_samples", "--micro_batch_tokens"]
    assert score(folder, *arguments, "64").exit_code == 0
    assert (folder / "out_samples.jsonl").read_text().count("\n") == 3
    assert json.loads((folder / "out.json").read_text())["config"]["micro_batch_tokens"] == [64]
    assert score(folder, "--output_path", folder).exit_code == 0
    assert (folder / "results.json").is_file()


def test_limit(folder):
    for limit, count in [("2", 2), ("0.5", 2), ("99", 3)]:
        score(folder, "--limit", limit, "--samples", folder / "s.jsonl")
        assert (folder / "s.jsonl").read_text().count("\n") == count


def test_dtypes_on_the_cpu(folder):
    scores = {}
    for dtype in ("float32", "float16", "bfloat16"):
        result = score(folder, "--dtype", dtype, "--samples", folder / f"{dtype}.jsonl")
        assert result.exit_code == 0, result.output
        lines = (folder / f"{dtype}.jsonl").read_text().splitlines()
        scores[dtype] = np.concatenate([json.loads(line)["loglikelihoods"] for line in lines])
    assert 0 < np.abs(scores["float16"] - scores["float32"]).max() < 0.1
    assert 0 < np.abs(scores["bfloat16"] - scores["float32"]).max() < 0.8


def test_dry_run_loads_no_weights(folder):
    (folder / "model" / "model.safetensors").unlink()
    result = score(folder, "--dry-run", "--output", folder / "r.json")
    assert result.exit_code == 0, result.output
    for part in ("3 questions, 9 rows", "micro-batches of 8,192 tokens", "GB of weights"):
        assert part in result.stdout
    assert not (folder / "r.json").exists()


def test_conventions_and_bos(folder):
    seen = set()
    for convention, bos in [("lm-eval", True), ("fastertransformer", False), ("llamacpp", True)]:
        result = score(folder, "--convention", convention, "--output", folder / "r.json")
        assert result.exit_code == 0, result.output
        report = json.loads((folder / "r.json").read_text())
        assert (report["config"]["convention"], report["config"]["bos"]) == (convention, bos)
        seen.add(report["cupyllama"]["tokens_asked"])
    no_bos = score(folder, "--bos", "no", "--output", folder / "r.json")
    assert no_bos.exit_code == 0
    assert json.loads((folder / "r.json").read_text())["config"]["bos"] is False


def test_what_a_run_reads_is_not_written_over(folder):
    """By whatever name it is given: the questions, the tokenizer, the samples of another run."""
    samples = folder / "s.jsonl"
    assert score(folder, "--samples", samples).exit_code == 0
    (folder / "link").symlink_to("s.jsonl")
    (folder / "questions").symlink_to("q.jsonl")
    tokenizer = folder / "model" / "tokenizer.model"
    before = {path: path.read_bytes() for path in (samples, folder / "q.jsonl", tokenizer)}
    for read, path, name in (
        ("--data", folder / "q.jsonl", folder / "work" / ".." / "q.jsonl"),
        ("--data", folder / "q.jsonl", folder / "questions"),
        ("--tokenizer", tokenizer, tokenizer),
        ("--compare", samples, samples),
        ("--compare", samples, folder / "link"),
    ):
        for written in ("--output", "--samples", "--trace"):
            result = score(folder, read, path, written, name)
            fails(result, 2, f"{written} and {read} are the same file: {name}")
    assert {path: path.read_bytes() for path in before} == before
    results = ["--output", folder / "r", "--trace", folder / "r"]
    fails(score(folder, *results), 2, "--trace and --output are the same file")


def test_results_that_nobody_may_look_for(folder):
    """Below a file, under names too long, and behind links that lead in a circle."""
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    places = {
        "q.jsonl/r": "Not a directory",
        "a": "Too many levels of symbolic links",
        "x" * 300: "File name too long",
        "x" * 250: "File name too long",  # with what FILE.partial adds
    }
    for name, reason in places.items():
        for written in ("--output", "--samples", "--trace"):
            result = score(folder, written, folder / name)
            fails(result, 1, f"{folder / name}: cannot be written: {reason}")
    fails(score(folder, "--samples", folder / "q.jsonl" / "s", "--resume"), 1, "Not a directory")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["score", "generate"])
def test_notes_that_nobody_can_read_end_nothing(folder, command):
    """Of a run whose stderr is on a full disk the results are there."""
    output = folder / "out"
    given = {
        "score": ["--data", folder / "q.jsonl", "--output", output],
        "generate": ["--prompt", "She pours", "--max-new-tokens", "2", "--output", output],
    }
    line = [*(sys.executable, "-m", "cupyllama", command), "--model", folder / "model"]
    line += given[command]
    # Buffered, so that there is something left to write when Python ends.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            list(map(str, line)), stdout=subprocess.PIPE, stderr=full, env=buffered
        )
    assert found.returncode == 0 and output.exists()


def test_usage(folder):
    run = CliRunner().invoke
    assert run(cli, ["score"]).exit_code == 2
    assert run(cli, ["score", "--demo", "--model", "x"]).exit_code == 2
    assert score(folder, "--log-samples").exit_code == 2
    for option in (
        *(["--limit", "0"], ["--limit", "1.5"], ["--limit", "x"], ["--dtype", "int8"]),
        *(["--output", ""], ["--data", ""]),
        *(["--micro-batch-tokens", "0"], ["--micro-batch-tokens", "many"], ["--bos", "perhaps"]),
        *(["--layers-per-stage", value] for value in ("", "2,", "0", "-1", "x", "1.5")),
    ):
        assert score(folder, *option).exit_code == 2, option
    fails(score(folder, "--micro-batch-tokens", "4"), 2, "does not fit a micro-batch of 4")


def test_every_command_helps():
    for name, command in cli.commands.items():
        assert command.help and f"cupyllama {name}" in command.help
        assert CliRunner().invoke(cli, [name, "--help"]).exit_code == 0


def test_doctor_names_a_remedy_for_what_is_missing():
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0, result.output
    for part in ("Python", "CPU", "driver", "GPU", "CuPy", "NVRTC", "cuBLAS", "NCCL", "MPI"):
        assert part in result.output


def test_missing_paths(folder):
    fails(score(folder, model="nowhere"), 3, folder / "nowhere", "no such directory")
    fails(score(folder, data="nowhere.jsonl"), 4, folder / "nowhere.jsonl", "No such file")
    fails(score(folder, "--tokenizer", folder / "t.model"), 3, folder / "t.model", "No such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_path(folder):
    (folder / "q.jsonl").chmod(0)
    fails(score(folder), 4, folder / "q.jsonl", "Permission denied")


def change_weights(folder, name, change):
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_likelihood_that_is_no_number_is_located(folder, value):
    # the embedding of a token that only question 1, choice 0 feeds
    from cupyllama.tokenizer import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(folder / "model" / "tokenizer.model")
    texts = [f"{q['query']} {c}" for q in QUESTIONS for c in q["choices"]]
    fed = [set(ids[:-1]) for ids in tokenizer.encode(texts)]
    only = fed[3] - set.union(*fed[:3], *fed[4:])
    assert only

    def poison(embedding):
        embedding[sorted(only)] = value
        return embedding

    change_weights(folder, "model.embed_tokens.weight", poison)
    outputs = ["--output", folder / "r.json", "--samples", folder / "s.jsonl"]
    fails(score(folder, *outputs), 3, "question 1 (", "q.jsonl, line 2), choice 0", "nan")
    assert not (folder / "r.json").exists() and not (folder / "s.jsonl").exists()


def test_broken_model_and_tokenizer(folder):
    write_tokenizer(folder / "model", 321)
    fails(score(folder), 3, "has 321 tokens, but the embedding", "320 rows")
    write_tokenizer(folder / "model")
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    output = folder / "r.json"
    fails(score(folder, "--output", output), 3, weights, "truncated", "download complete")
    assert not output.exists()


def test_no_gpu(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = ["-m", "cupyllama", "score", "--model", folder / "model", "--device", "cuda"]
    answer = subprocess.run(
        [sys.executable, *map(str, command), "--data", str(folder / "q.jsonl")],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 5 and answer.stdout == ""
    assert "no usable GPU" in answer.stderr and "cupyllama doctor" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
def test_a_home_directory_that_is_none(folder, monkeypatch):
    """CuPy makes its cache there as it is imported."""
    monkeypatch.setenv("HOME", str(folder / "q.jsonl"))
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    said = "q.jsonl/.cupy': set CUPY_CACHE_DIR to a directory that can be written"
    answer = printed(["score", "--demo", "--limit", "2"], stdout=subprocess.PIPE)
    assert answer.returncode == 0 and "acc_norm" in answer.stdout
    assert "no GPU (" in answer.stderr and f"{said}); computing on the CPU\n" in answer.stderr
    for command in (["score", "--demo", "--device", "cuda"], ["bench", "kernels"]):
        answer = printed(command, stdout=subprocess.PIPE)
        assert (answer.returncode, answer.stdout) == (5, "")
        assert answer.stderr.startswith("cupyllama: no usable GPU: ")
        assert f"{said}\n" in answer.stderr and "Traceback" not in answer.stderr
    answer = printed(["doctor"], stdout=subprocess.PIPE)
    assert answer.stdout.count("set CUPY_CACHE_DIR") == 5  # GPU, NVRTC, cuBLASLt, kernels, NCCL


def test_results_that_cannot_be_written(folder):
    fails(score(folder, "--output", folder / "no" / "r.json"), 1, "r.json", "cannot be written")
    fails(score(folder, "--samples", folder / "model"), 1, "model: is a directory")


SCORE = ["score", "--demo", "--limit", "2", "--device", "cpu", "--quiet"]
PRINTING = [SCORE, [*SCORE, "--dry-run"], ["doctor"]]


def printed(arguments, shell='exec "$@"', **streams):
    """A process with its own stdout, buffered, so that something is left when Python ends."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-m", "cupyllama", *arguments]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, env=buffered, **streams)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_a_full_disk_behind_stdout(arguments):
    answer = printed(arguments, 'exec "$@" > /dev/full')
    assert answer.returncode == 1
    assert answer.stderr == (
        "cupyllama: stdout: cannot be written: No space left on device\n"
        "  Is there space left on the disk?\n"
    )


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_nobody_reads_stdout_any_more(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    answer = printed(arguments, stdout=writing)
    os.close(writing)
    assert (answer.returncode, answer.stderr) == (1, "")


@pytest.mark.parametrize("arguments", PRINTING, ids=" ".join)
def test_stdout_that_is_closed(arguments):
    answer = printed(arguments, 'exec "$@" >&-')
    assert (answer.returncode, answer.stderr) == (0, "")


def test_files_that_a_shell_has_open(tmp_path):
    """--samples and --output leave in them what is there, and nothing beside them."""
    path = tmp_path / "out"
    path.write_text("there before\n")
    answer = printed([*SCORE, "--samples", "/dev/stdout"], f'exec "$@" >> {path}')
    assert (answer.returncode, answer.stderr) == (0, "")
    before, *samples = path.read_text().splitlines()[:3]
    assert before == "there before" and [json.loads(s)["doc_id"] for s in samples] == [0, 1]
    assert "acc_norm" in path.read_text()  # the report, behind them
    answer = printed([*SCORE, "--output", "/dev/stdout"], f'exec "$@" > {path}')
    results, _ = json.JSONDecoder().raw_decode(path.read_text())
    assert results["n-samples"]["demo"]["effective"] == 2 and "acc_norm" in path.read_text()
    assert os.listdir(tmp_path) == ["out"]
    assert not os.path.lexists("/dev/stdout.partial")
    answer = printed([*SCORE, "--output", "/dev/stdout", "--log-samples"], f'exec "$@" > {path}')
    assert answer.returncode == 2 and "--log-samples writes beside --output FILE" in answer.stderr


def test_answers_that_are_no_numbers(folder):
    """As float16 that overflows makes them; another dtype is the remedy, as the hint says."""
    path = write_overflowing_model(folder / "overflowing")
    write_tokenizer(path, json.loads((path / "config.json").read_text())["vocab_size"])
    result = score(folder, "--dtype", "float16", model="overflowing")
    fails(result, 3, "question 0", "choice 0: the log-likelihood is nan", "try --dtype bfloat16")
    assert score(folder, "--dtype", "float32", model="overflowing").exit_code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(folder):
    """A small file system of its own needs root, so the limit on file sizes stands in for it."""
    output = folder / "samples.jsonl"
    command = [sys.executable, "-m", "cupyllama", "score", "--model", folder / "model", "--device"]
    command += ["cpu", "--data", folder / "q.jsonl", "--samples", output]
    limited = "import resource, signal, sys, runpy\n"
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    limited += "sys.argv = sys.argv[1:]\nrunpy.run_module('cupyllama', run_name='__main__')"
    command[1:3] = ["-c", limited, "cupyllama"]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert answer.returncode == 1, answer.stderr
    assert f"{output}.partial: cannot be written: File too large" in answer.stderr
    assert "Traceback" not in answer.stderr and os.listdir(folder) == ["model", "q.jsonl"]
