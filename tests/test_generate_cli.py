"""`cupyllama generate` as a user meets it: prompts in, text out, a terminal, several ranks."""

import fcntl
import json
import os
import pty
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from engine import build_stage, score_rows
from tiny_generation import write_overflowing_model
from tiny_models import write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.cli import cli
from cupyllama.errors import UsageError
from cupyllama.generation.answers import Pace, end_token_ids
from cupyllama.generation.answers_file import AnswersFile
from cupyllama.packing import TokenRow
from cupyllama.tasks.files import demo_directory
from cupyllama.tokenizer import load_tokenizer

DEMO = demo_directory()
PROMPTS = ["The man on the roof", "A lady walks to a", "She pours", "How to choose a bike:"]
# Runs the command line with a model that takes a tenth of a second for a token.
SLOW = """
import sys, time
from cupyllama.ops import decode_reference
step = decode_reference.Decoder.step
def slow(self, positions):
    time.sleep(0.1)
    return step(self, positions)
decode_reference.Decoder.step = slow
from cupyllama.cli import cli
sys.argv[:1] = ["cupyllama"]
cli()
"""


def generate(*arguments, model="--demo", stdin=None):
    fixed = ["generate", model, "--device", "cpu", *arguments]
    return CliRunner().invoke(cli, list(map(str, fixed)), input=stdin)


def text_of(*arguments):
    """What goes to stdout, without the end of the line."""
    result = generate("--quiet", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("\n") and result.stderr == ""
    return result.stdout[:-1]


def fails(result, exit_code, *parts):
    """One line and a hint on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    for part in parts:
        assert str(part) in result.stderr
    assert "Traceback" not in result.stderr


def is_usage(result, part):
    assert result.exit_code == 2 and part in result.output, result.output


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_likeliest_text_is_what_scoring_calls_greedy():
    stage, tokenizer = build_stage(DEMO), load_tokenizer(DEMO)
    for prompt in PROMPTS:
        text = text_of("--prompt", prompt, "--max-new-tokens", 20)
        begin, whole = ([1, *ids] for ids in tokenizer.encode([prompt, prompt + text]))
        assert whole[: len(begin)] == begin and len(whole) > len(begin) + 3
        scores = score_rows(stage, [TokenRow(whole, len(begin), 0)])
        assert scores.is_greedy[0], text
        worse = [*whole[:-1], whole[-1] + 1]
        assert not score_rows(stage, [TokenRow(worse, len(begin), 0)]).is_greedy[0]


def test_several_prompts_are_answered_as_each_alone(prompts_file, tmp_path):
    more, path = ["--max-new-tokens", 24], tmp_path / "out.jsonl"
    alone = [text_of("--prompt", prompt, *more) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    for size in (1, 3, 32):
        result = generate("--prompts", prompts_file, "--batch-size", size, *more)
        assert result.exit_code == 0, result.output
        blocks = [p + text + "\n\n" for p, text in zip(PROMPTS, alone, strict=True)]
        assert result.stdout == "".join(blocks)
        assert re.search(r"4 prompts: \d+ tokens in [\d.]+ s: ", result.stderr)
        silent = text_of_file("--prompts", prompts_file, "--batch-size", size, *more, path=path)
        assert [record["text"] for record in silent] == alone
    assert text_of_stdin(prompts_file, *more) == "".join(blocks)


def text_of_file(*arguments, path):
    """The records of --output; with several prompts nothing else is printed."""
    result = generate("--quiet", "--output", path, *arguments)
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    return records_of(path)


def text_of_stdin(path, *arguments):
    result = generate("--quiet", *arguments, stdin=path.read_text())
    assert result.exit_code == 0, result.output
    return result.stdout


def test_records(prompts_file, tmp_path):
    tokenizer = load_tokenizer(DEMO)
    arguments = ["--prompts", prompts_file, "--max-new-tokens", 150, "--stop", " small"]
    records = text_of_file(*arguments, path=tmp_path / "out.jsonl")
    assert list(records[0]) == ["prompt", "text", "prompt_tokens", "tokens", "finish_reason"]
    assert [record["prompt"] for record in records] == PROMPTS
    for record in records:
        (ids,) = tokenizer.encode([record["prompt"]])
        assert record["prompt_tokens"] == 1 + len(ids)
    stopped, *others = records
    assert stopped["finish_reason"] == "stop" and stopped["text"].endswith("doors of the")
    assert {record["finish_reason"] for record in others} == {"eos"}
    for record in others:  # of the tokens, the last one is EOS
        assert record["tokens"] == len(tokenizer.encode([record["text"].strip()])[0]) + 1
    limited = ["--prompt", "She pours", "--max-new-tokens", 5, "--output", tmp_path / "out.jsonl"]
    text = text_of(*limited)  # one prompt is printed, too
    (record,) = records_of(tmp_path / "out.jsonl")
    assert (record["text"], record["tokens"], record["finish_reason"]) == (text, 5, "length")


def test_json_lines_as_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    records = text_of_file("--prompts", path, "--max-new-tokens", 9, path=tmp_path / "out.jsonl")
    expected = [text_of("--prompt", p, "--max-new-tokens", 9) for p in PROMPTS]
    assert [record["text"] for record in records] == expected


def test_stop_texts():
    whole = text_of("--prompt", PROMPTS[0], "--max-new-tokens", 20)
    assert " of the small truck." in whole
    for stops in (["mall tr"], ["xyz", "mall tr"], ["mall truck. He", "mall tr"]):
        given = [argument for stop in stops for argument in ("--stop", stop)]
        cut = text_of("--prompt", PROMPTS[0], "--max-new-tokens", 20, *given)
        assert cut == whole[: whole.index("mall tr")]
    unseen = ["--stop", whole[-4:] + "more"]  # what was held back is printed at the end
    assert text_of("--prompt", PROMPTS[0], "--max-new-tokens", 20, *unseen) == whole


def test_a_seed_gives_the_same_text_again(prompts_file, tmp_path):
    settings = ["--temperature", 1, "--top-k", 40, "--top-p", 0.95, "--max-new-tokens", 16]

    def drawn(*arguments):
        return text_of_file(
            "--prompts", prompts_file, *settings, *arguments, path=tmp_path / "out.jsonl"
        )

    first = drawn("--seed", 7)
    assert drawn("--seed", 7, "--batch-size", 1) == first
    assert drawn("--seed", 8) != first
    assert drawn() == drawn("--seed", 0) != first
    alone = text_of("--prompt", PROMPTS[0], *settings, "--seed", 7)
    assert alone == first[0]["text"]
    prompts_file.write_text("She pours\n" * 4)
    assert len({record["text"] for record in drawn("--seed", 7)}) > 1  # not one draw four times


def test_top_k_and_top_p_draw_without_a_temperature():
    greedy = text_of("--prompt", PROMPTS[0])
    drawn = {text_of("--prompt", PROMPTS[0], "--top-p", 0.99, "--seed", s) for s in range(3)}
    assert len(drawn) == 3 and greedy not in drawn
    assert text_of("--prompt", PROMPTS[0], "--top-k", 1) == greedy
    assert text_of("--prompt", PROMPTS[0], "--temperature", 0) == greedy


def test_a_repetition_penalty_changes_what_comes():
    plain = text_of("--prompt", PROMPTS[0], "--max-new-tokens", 40)
    assert text_of("--prompt", PROMPTS[0], "--max-new-tokens", 40, "--repetition-penalty", 9) != (
        plain
    )


def test_beams_find_a_likelier_text(prompts_file, tmp_path):
    stage, tokenizer = build_stage(DEMO), load_tokenizer(DEMO)
    more = ["--prompts", prompts_file, "--max-new-tokens", 12]
    texts = {}
    for width in (1, 6):
        records = text_of_file(*more, "--beam-width", width, path=tmp_path / "out.jsonl")
        texts[width] = [record["text"] for record in records]
    assert texts[1] == [
        record["text"] for record in text_of_file(*more, path=tmp_path / "out.jsonl")
    ]
    differing = 0
    for prompt, greedy, found in zip(PROMPTS, texts[1], texts[6], strict=True):
        begin, *whole = (
            [1, *ids] for ids in tokenizer.encode([prompt, prompt + greedy, prompt + found])
        )
        rows = [TokenRow(ids, len(begin), place) for place, ids in enumerate(whole)]
        sums = score_rows(stage, rows).loglikelihoods
        means = [total / (len(ids) - len(begin)) for total, ids in zip(sums, whole, strict=True)]
        differing += greedy != found
        assert means[1] >= means[0] - 1e-4, (greedy, found)
    assert differing


def test_text_comes_token_by_token():
    command = [sys.executable, "-c", SLOW, "generate", "--demo", "--device", "cpu", "--prompt"]
    command += [PROMPTS[0], "--max-new-tokens", "12"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        came, text = [], b""
        while part := os.read(process.stdout.fileno(), 1000):
            came.append(time.monotonic())
            text += part
    assert process.returncode == 0
    assert text.decode() == text_of("--prompt", PROMPTS[0], "--max-new-tokens", 12) + "\n"
    assert len(came) > 8 and came[-1] - came[0] > 0.7


# What ends a run


def test_usage(tmp_path, prompts_file):
    is_usage(CliRunner().invoke(cli, ["generate"]), "Give one of --model DIR and --demo")
    is_usage(generate("--prompt", "a", "--prompts", prompts_file), "Give one of --prompt TEXT and")
    is_usage(generate("--prompts", prompts_file, "--output", prompts_file), "are the same file")
    for flag in ("temperature", "top-k", "top-p", "repetition-penalty", "seed"):
        for value in ("1", "0") if flag in ("temperature", "seed") else ("1",):
            result = generate("--prompt", "a", "--beam-width", 2, f"--{flag}", value)
            is_usage(result, f"--beam-width searches for the likeliest text, and --{flag} is")
    for flag in ("top-k", "top-p", "seed"):
        result = generate("--prompt", "a", "--temperature", 0, f"--{flag}", 1)
        is_usage(result, f"--temperature 0 takes the most likely token, and --{flag} is for draws")
    for more in ([], ["--repetition-penalty", 2]):
        result = generate("--prompt", "a", "--seed", 0, *more)
        is_usage(result, "--seed is for draws, and without --temperature, --top-k or --top-p the")
    for size in (1, 32):
        result = generate("--prompt", "a", "--beam-width", 2, "--batch-size", size)
        is_usage(result, "--beam-width answers one prompt after the other, and --batch-size is for")
    for option in (
        *(["--temperature", "-1"], ["--temperature", "hot"], ["--top-k", "0"], ["--top-p", "0"]),
        *(["--top-p", "1.1"], ["--repetition-penalty", "0"], ["--seed", "-1"]),
        *(
            ["--beam-width", "0"],
            ["--beam-width", "257"],
            ["--max-new-tokens", "0"],
            ["--batch-size", "0"],
            ["--stop"],
        ),
    ):
        assert generate("--prompt", "a", *option).exit_code == 2, option
    fails(generate("--prompt", "a", "--stop", ""), 2, "--stop '' is empty")
    fails(generate("--prompt", "a", "--temperature", "1e-40"), 2, "temperature 1e-40 is not")


def test_wrong_prompts(tmp_path, prompts_file):
    fails(generate("--prompt", ""), 4, "--prompt: the prompt is empty")
    fails(generate("--prompt", " \n"), 4, "--prompt: the prompt is empty")
    fails(generate(stdin=""), 4, "stdin: holds no prompts")
    fails(generate(stdin=b"a\n\xff\n"), 4, "stdin, line 2: not UTF-8 at byte 0")
    fails(generate("--prompts", tmp_path / "no.txt"), 4, "no.txt: No such file")
    prompts_file.write_bytes(b"a\nb\nc\xe9\n")
    fails(generate("--prompts", prompts_file), 4, "prompts.txt, line 3: not UTF-8 at byte 1")
    prompts_file.write_text("a\n\n")
    fails(generate("--prompts", prompts_file), 4, "prompts.txt, line 2: the prompt is empty")
    prompts_file.write_text("a\n" + "the man " * 300)
    output = ["--output", tmp_path / "out.jsonl"]
    long = generate("--prompts", prompts_file, "--max-new-tokens", 10, *output)
    fails(long, 4, "prompts.txt, line 2: the prompt 'the man the man", "tokens, and with 10 new")
    assert "would pass the model's 512" in long.stderr and "Shorten the prompt." in long.stderr
    assert not (tmp_path / "out.jsonl").exists()
    fails(generate("--prompt", "a", "--max-new-tokens", 600), 4, "--max-new-tokens 510 or fewer")


def test_outputs_that_cannot_be_written(tmp_path, prompts_file):
    fails(generate("--prompt", "a", "--output", tmp_path / "no" / "o"), 1, "cannot be written")
    fails(generate("--prompt", "a", "--output", tmp_path), 1, "is a directory")


def test_an_output_that_is_the_prompts_by_another_name(prompts_file, tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(prompts_file)
    is_usage(generate("--prompts", prompts_file, "--output", link), "are the same file")
    assert prompts_file.read_text().splitlines() == PROMPTS


def test_full_disks(prompts_file, tmp_path):
    more = ["--max-new-tokens", 3]
    result = generate("--prompts", prompts_file, "--output", "/dev/full", *more)
    fails(result, 1, "/dev/full: cannot be written: No space left on device")
    (tmp_path / "out.jsonl.partial").symlink_to("/dev/full")
    result = generate("--prompts", prompts_file, "--output", tmp_path / "out.jsonl", *more)
    fails(result, 1, "out.jsonl.partial: cannot be written: No space left on device")
    command = [sys.executable, "-m", "cupyllama", "generate", "--demo", "--device", "cpu"]
    # Buffered, so that there is something left to write when Python ends.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for given in (["--prompts", prompts_file], ["--prompt", PROMPTS[0]]):
        with open("/dev/full", "w") as full:
            answer = subprocess.run(
                list(map(str, [*command, *given, *more])),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=buffered,
            )
        assert answer.returncode == 1
        assert answer.stderr == (
            "cupyllama: stdout: cannot be written: No space left on device\n"
            "  Is there space left on the disk?\n"
        )


def test_files_that_a_shell_has_open(prompts_file, tmp_path):
    """An --output that stands for one of them leaves in it what is there."""
    path, command = tmp_path / "out", [sys.executable, "-m", "cupyllama", "generate", "--demo"]
    command += ["--device", "cpu", "--quiet", "--max-new-tokens", "3", "--prompts"]
    text = tmp_path / "out.jsonl"
    records = text_of_file("--prompts", prompts_file, "--max-new-tokens", 3, path=text)
    for name, redirection in (("/dev/stdout", ">>"), ("/dev/fd/3", "3>>")):
        path.write_text('"there before"\n')
        given = [*command, str(prompts_file), "--output", name]
        shell = f'exec "$@" {redirection} {path}'
        answer = subprocess.run(["sh", "-c", shell, "sh", *given], capture_output=True, text=True)
        assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
        assert records_of(path) == ["there before", *records]
    assert sorted(os.listdir(tmp_path)) == ["out", "out.jsonl", "prompts.txt"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("more", [[], ["--output", "/dev/stdout"]])
def test_nobody_reads_stdout_any_more(more, unbuffered, prompts_file):
    command = [sys.executable, "-m", "cupyllama", "generate", "--demo", "--device", "cpu"]
    command += ["--quiet", "--prompts", str(prompts_file), "--max-new-tokens", "3", *more]
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    answer = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writing)
    assert (answer.returncode, answer.stderr) == (1, "")


def test_stdout_that_is_closed(prompts_file):
    command = [sys.executable, "-m", "cupyllama", "generate", "--demo", "--device", "cpu"]
    for given in (["--prompts", prompts_file], ["--prompt", PROMPTS[0]]):
        line = [*command, *given, "--quiet", "--max-new-tokens", "3"]
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", *map(str, line)]
        answer = subprocess.run(shell, stderr=subprocess.PIPE, text=True)
        assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize(
    "more", [[], ["--top-p", 0.9], ["--beam-width", 2], ["--repetition-penalty", 1.2]]
)
def test_float16_that_overflows(more, prompts_file, tmp_path):
    """Another dtype is the remedy, as the hint says."""
    model = write_overflowing_model(tmp_path / "model")
    write_tokenizer(model, json.loads((model / "config.json").read_text())["vocab_size"])
    for given, name in ((["--prompt", "the man"], "--prompt"), (["--prompts", prompts_file], "1")):
        arguments = [*given, *more, "--max-new-tokens", 5]
        result = generate(*arguments, "--dtype", "float16", model=f"--model={model}")
        fails(result, 3, f"{name}: the logits of new token 1 are NaN or infinite")
        assert result.stderr.endswith(
            "  float16 may overflow: try --dtype bfloat16 or float32. If that does not help, the "
            "weights are broken.\n"
        )
        for dtype in ("bfloat16", "float32"):
            result = generate(*arguments, "--dtype", dtype, model=f"--model={model}")
            assert result.exit_code == 0, result.output


# At the 60th step, when two answers are whole, and not the one before them.
EARLY_END = """
import os, sys
from cupyllama.ops import decode_reference
steps, step = iter(range(100)), decode_reference.Decoder.step
def ending(self, positions):
    if next(steps) == 60:
        os.kill(os.getpid(), {number})
    return step(self, positions)
decode_reference.Decoder.step = ending
from cupyllama.cli import cli
sys.argv[:1] = ["cupyllama"]
cli()
"""


def ended_early(number, path, *arguments):
    """A run that a signal ends."""
    command = [sys.executable, "-c", EARLY_END.format(number=int(number)), "generate", "--demo"]
    command += ["--device", "cpu", "--prompts", path, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def test_what_is_whole_outlives_a_run_that_ends_early(prompts_file, tmp_path):
    prompts_file.write_text("A dog\nShe pours\nThe man on\n")
    path, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    whole = text_of_file("--prompts", prompts_file, path=path)
    assert [record["tokens"] for record in whole] == [66, 56, 58] and not partial.exists()
    path.write_text("an earlier run\n")
    partial.touch()  # of a run that ended before its first answer was whole
    for number in (signal.SIGKILL, signal.SIGINT):
        result = ended_early(number, prompts_file, "--output", path)
        assert records_of(partial) == whole[1:]
        assert path.read_text() == "an earlier run\n" and result.stdout == ""
        again = generate("--prompts", prompts_file, "--output", path)
        fails(again, 2, f"{partial}: has answers of a run that has not ended", "delete it")
        assert records_of(partial) == whole[1:]
        partial.unlink()
    assert result.returncode == 130
    assert result.stderr == f"{partial} has 2 answers of 3\ncupyllama: interrupted\n"
    assert text_of_file("--prompts", prompts_file, path=path) == whole and not partial.exists()


def test_a_link_as_output(prompts_file, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "out.jsonl")
    prompts_file.write_text("A dog\nShe pours\nThe man on\n")
    result = ended_early(signal.SIGINT, prompts_file, "--output", link)
    partial = tmp_path / "there" / "out.jsonl.partial"
    assert result.stderr.startswith(f"{partial} has 2 answers of 3\n")
    assert len(records_of(partial)) == 2


def test_what_is_whole_is_printed_by_a_run_that_is_interrupted(prompts_file):
    prompts_file.write_text("A dog\nShe pours\nThe man on\n")
    whole = text_of_stdin(prompts_file)
    result = ended_early(signal.SIGINT, prompts_file)
    assert (result.returncode, result.stderr) == (130, "cupyllama: interrupted\n")
    assert result.stdout == whole[whole.index("She pours") :] != whole


def test_a_model_of_another_vocabulary(tmp_path):
    model = write_tiny_model("gqa", tmp_path / "model")
    fails(generate("--prompt", "a", model=f"--model={model}"), 3, "has no tokenizer.model")
    write_tokenizer(model, 321)
    fails(generate("--prompt", "a", model=f"--model={model}"), 3, "has 321 tokens, but the")


@pytest.mark.parametrize("name", ["opt", "opt_350m", "gqa", "tied", "odd"])
def test_random_models(name, tmp_path):
    """Their text is of any bytes; tokens are drawn from all of the vocabulary."""
    model = write_tiny_model(name, tmp_path / "model")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    write_tokenizer(model, size)
    for quantize in ("none", "int8"):
        arguments = ["--prompt", "the man", "--top-p", 1, "--quantize", quantize]
        result = generate("--quiet", *arguments, model=f"--model={model}")
        assert result.exit_code == 0, result.output
        assert len(result.stdout) > 20


def test_ends_of_an_answer(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert end_token_ids(tmp_path, tokenizer) == {2}
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert end_token_ids(tmp_path, tokenizer) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_token_ids(tmp_path, tokenizer) == {7, 9}
    (tmp_path / "generation_config.json").write_text("{}")
    assert end_token_ids(tmp_path / "reshard-*.pt", tokenizer) == {7}
    (tmp_path / "config.json").write_text('{"eos_token_id": "</s>"}')
    fails(generate("--prompt", "a", model=f"--model={tmp_path}"), 3, "config.json")


def test_the_line_that_closes_an_answer():
    pace = Pace()
    assert str(pace).startswith("0 tokens in 0.00 s: 0.0 tokens/s")
    pace.began -= 2.0
    pace.count()
    pace.began -= 8.0
    pace.count(9)
    assert pace.first == pytest.approx(2, abs=0.1) and pace.last == pytest.approx(10, abs=0.1)
    assert str(pace) == "10 tokens in 10.00 s: 1.0 tokens/s, the first after 2.000 s"


def test_importing_is_free():
    code = "import cupyllama.cli_generate, sys\nprint('numpy' in sys.modules)\n"
    code += "import cupyllama.generate\n"
    code += "print(*({'cupy', 'mpi4py', 'datasets', 'tqdm', 'readline'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "False\n\n", answer.stderr


# A session


class Terminal:
    """A process at a terminal of its own; what is typed, and what is seen."""

    def __init__(self, command, environment):
        self.own, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | environment,
            start_new_session=True,
            # the session's own terminal, so that its Ctrl-C is an interrupt
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text):
        self.seen = ""
        os.write(self.own, text.encode())

    def wait_for(self, part, seconds=30):
        assert self.sees(part, seconds), f"no {part!r} in {self.seen!r}"

    def sees(self, part, seconds):
        """Whether it comes in that time."""
        end = time.monotonic() + seconds
        while part not in self.seen:
            ready, _, _ = select.select([self.own], [], [], max(0, end - time.monotonic()))
            if not ready:
                return False
            try:
                self.seen += os.read(self.own, 10_000).decode(errors="replace")
            except OSError:  # the other end is closed
                return part in self.seen
        return True

    def wait_for_sign(self):
        """Until a line is asked for: what is typed before is not for `input`, or Ctrl-D no end.

        The sign stands at the beginning of a line; readline, which draws a line again that is
        edited, goes back to its beginning and begins no other.
        """
        self.wait_for("\n> ")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.own)


@contextmanager
def session(tmp_path, *arguments, code=SLOW):
    command = [sys.executable, "-c", code, "generate", "--demo", "--device", "cpu", *arguments]
    environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "dumb"}
    terminal = Terminal(command, environment)
    try:
        terminal.wait_for("> ")
        yield terminal
    finally:
        terminal.close()


def test_a_session(tmp_path):
    whole = text_of("--prompt", PROMPTS[1], "--max-new-tokens", 8)
    with session(tmp_path, "--max-new-tokens", "8") as terminal:
        terminal.type(PROMPTS[1] + "\n")
        terminal.wait_for("tokens/s")
        assert whole in terminal.seen.replace("\r\n", "\n") and "8 tokens in" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("\n")  # nothing to answer
        terminal.wait_for_sign()
        terminal.type("the man " * 300 + "\n")
        terminal.wait_for("Shorten the prompt.")
        assert "this line: the prompt" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("xyz\x01\x0bShe pours\x0e\n")  # to the beginning, cut, and another text
        terminal.wait_for("tokens/s")
        terminal.wait_for_sign()
        terminal.type("\x10\x10\x10\n")  # three lines back in the history
        terminal.wait_for(whole[:5])
        terminal.wait_for("tokens/s")
        assert whole in terminal.seen.replace("\r\n", "\n")
        terminal.wait_for_sign()
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0
    history = (tmp_path / "state" / "cupyllama" / "history").read_text()
    assert history.splitlines()[0] == PROMPTS[1] and "She pours" in history
    with session(tmp_path, "--max-new-tokens", "2") as terminal:
        terminal.type("\x10")
        terminal.wait_for(PROMPTS[1])  # of the session before
        for _ in range(10):  # Python misses a signal while readline draws
            terminal.type("\x03")  # the line is given up, the session is not
            if terminal.sees("\n> ", 3):
                break
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


def test_a_session_says_what_it_has_room_for(tmp_path):
    code = SLOW.replace("cli()", "import cupyllama.generate\ncupyllama.generate.LINE_TOKENS = 64")
    with session(tmp_path, "--max-new-tokens", "8", code=code + "\ncli()") as terminal:
        terminal.type("the man " * 50 + "\n")
        terminal.wait_for("give it with --prompt: the model sees 512 tokens.")
        assert "it would pass the 64 that a session has room for" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("the man " * 300 + "\n")
        terminal.wait_for("Shorten the prompt.")
        assert "it would pass the model's 512" in terminal.seen
        terminal.wait_for_sign()
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


@pytest.mark.parametrize("beams", [[], ["--beam-width", "2"]])
def test_ctrl_c_ends_the_answer_and_not_the_session(tmp_path, beams):
    code = SLOW if not beams else SLOW.replace("step", "next_logits").replace("positions", "batch")
    whole = text_of("--prompt", PROMPTS[0])
    with session(tmp_path, *beams, code=code) as terminal:
        terminal.type(PROMPTS[0] + "\n")
        if beams:
            terminal.wait_for("\n")  # the line is taken
            time.sleep(0.5)
        else:
            terminal.wait_for(whole[:8])
        terminal.type("\x03")
        terminal.wait_for("tokens/s")
        assert "Traceback" not in terminal.seen and whole[-10:] not in terminal.seen
        terminal.wait_for_sign()
        terminal.type(PROMPTS[2] + "\n")  # the engine is as it was
        if not beams:
            terminal.wait_for(text_of("--prompt", PROMPTS[2], "--max-new-tokens", 8))
            terminal.type("\x03")
        terminal.wait_for("tokens/s")
        terminal.wait_for_sign()
        terminal.type("\x04")
        assert terminal.process.wait(timeout=10) == 0


def test_ctrl_c_ends_a_command_with_a_prompt(tmp_path):
    command = [sys.executable, "-c", SLOW, "generate", "--demo", "--device", "cpu", "--prompt"]
    terminal = Terminal([*command, PROMPTS[0]], {})
    try:
        terminal.wait_for(" and doors")
        terminal.type("\x03")
        terminal.wait_for("cupyllama: interrupted")
        assert terminal.process.wait(timeout=10) == 130 and "Traceback" not in terminal.seen
    finally:
        terminal.close()


# Several ranks

MPIRUN = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or shutil.which("mpirun")
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")
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
    result.said = [
        line
        for line in result.stderr.replace("\0", "").splitlines()
        if line.startswith("cupyllama: ")
    ]
    return result


@needs_mpirun
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


@needs_mpirun
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


@needs_mpirun
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


@needs_mpirun
@pytest.mark.parametrize("more", [[], ["--tensor-parallel", 2], ["--beam-width", 2]])
def test_logits_that_are_no_numbers_are_said_once(more, prompts_file):
    result = mpirun(2, "--prompts", prompts_file, *more, fault=BROKEN)
    place = f"{prompts_file}, line 1"
    assert result.said == [f"cupyllama: {place}: the logits of new token 1 are NaN or infinite"]
    assert result.returncode == 3 and result.stdout == ""


@needs_mpirun
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


@needs_mpirun
def test_a_rank_that_is_killed_in_mid_run_leaves_what_is_whole(prompts_file, tmp_path):
    prompts_file.write_text("A dog\nShe pours\nThe man on\n")
    path = tmp_path / "out.jsonl"
    fault = FAULT.replace("== 5", "== 60").format(rank=1, fault=KILL)
    result = mpirun(2, "--prompts", prompts_file, "--output", path, fault=fault)
    assert result.said == ["cupyllama: rank 1: was killed or crashed"], result.stderr
    assert f"\n  Answers that were whole, if any, are in {path}.partial.\n" in result.stderr
    found = [record["prompt"] for record in records_of(tmp_path / "out.jsonl.partial")]
    assert found == ["She pours", "The man on"]


@needs_mpirun
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


def test_the_history_lies_where_the_system_wants_it(monkeypatch):
    from cupyllama.generation.console import history_path

    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    usual = Path("/home/somebody/.local/state/cupyllama/history")
    assert history_path() == usual
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path() == usual
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/cupyllama/history")


def test_a_session_of_somebody_without_a_home(monkeypatch, capsys):
    from cupyllama.generation.console import line_editing

    def no_such_user(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_such_user)
    with line_editing():
        pass
    assert capsys.readouterr() == ("", "")


def test_two_runs_do_not_write_over_each_other(tmp_path):
    """The second one finds the first one's answers, or its lock, when it has an answer itself."""
    path = tmp_path / "out.jsonl"

    def begun():
        answer = SimpleNamespace(text="b", tokens=1, finish_reason="length")
        return AnswersFile(path, [SimpleNamespace(text="a")], [[1, 2]], [answer])

    first, second = begun(), begun()
    assert list(first.keep(iter([(0, "b")]))) == [(0, "b")]
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(UsageError, match="another process is writing it"):
        list(second.keep(iter([(0, "b")])))
    assert second.close() is None
    assert first.close() == f"{tmp_path / 'out.jsonl.partial'} has 1 answer of 1"
    third = begun()
    with pytest.raises(UsageError, match="has answers of a run that has not ended"):
        list(third.keep(iter([(0, "b")])))
    assert third.close() is None
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept
