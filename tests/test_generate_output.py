"""Where answers go: full disks, links, what others have open, and runs that end early."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from generate_command import (
    PROMPTS,
    fails,
    generate,
    is_usage,
    records_of,
    text_of_file,
    text_of_stdin,
)
from generate_command import prompts_file as prompts_file

from cupyllama.errors import UsageError
from cupyllama.generation.answers_file import AnswersFile


def test_outputs_that_cannot_be_written(tmp_path, prompts_file):
    fails(generate("--prompt", "a", "--output", tmp_path / "no" / "o"), 1, "cannot be written")
    fails(generate("--prompt", "a", "--output", tmp_path), 1, "is a directory")
    below = prompts_file / "o"
    for given in (["--prompt", "a"], ["--prompts", prompts_file]):
        fails(
            generate(*given, "--output", below), 1, f"{below}: cannot be written: Not a directory"
        )
    (tmp_path / "a").symlink_to("a")
    in_a_circle = generate("--prompts", prompts_file, "--output", tmp_path / "a")
    fails(in_a_circle, 1, "a: cannot be written: Too many levels of symbolic links")


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
