"""The journal: what was answered is there after a kill at any byte."""

import errno
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner

from cupyllama import files
from cupyllama.cli import cli
from cupyllama.errors import OutputError, UsageError
from cupyllama.evaluate import ChoiceScores
from cupyllama.journal import Journal

SETTINGS = {"model": "a" * 64, "convention": "lm-eval", "micro_batch_tokens": 64}


def scored(values: dict[int, float], choices: int = 6) -> ChoiceScores:
    scores = ChoiceScores.empty(choices, 64)
    numbers = np.array(sorted(values), int)
    scores.put(numbers, np.array([values[i] for i in sorted(values)]), numbers % 2 == 0)
    return scores


@pytest.fixture
def written(tmp_path):
    """A journal of two micro-batches."""
    journal = Journal(tmp_path / "s.jsonl")
    journal.begin(SETTINGS)
    journal.append(scored({0: -1.1, 3: -0.1 - 1e-16}), np.array([0, 3]))
    journal.append(scored({1: -7.25}), np.array([1]))
    journal.close()
    return journal.path.read_bytes()


@pytest.mark.parametrize("cut", ["whole", "half a line", "no newline", "one line"])
def test_every_whole_line_counts(cut, written, tmp_path):
    lines = written.splitlines(keepends=True)
    content, expected = {
        "whole": (written, [0, 1, 3]),
        "half a line": (written[:-9], [0, 3]),
        "no newline": (written[:-1], [0, 3]),
        "one line": (lines[0], []),
    }[cut]
    journal = Journal(tmp_path / "s.jsonl")
    journal.path.write_bytes(content)
    scores = ChoiceScores.empty(6, 64)
    assert journal.settings() == SETTINGS
    assert journal.resume(SETTINGS, scores) == len(expected)
    assert np.flatnonzero(scores.done).tolist() == expected
    if expected:
        assert scores.loglikelihoods[3] == -0.1 - 1e-16 and not scores.is_greedy[3]
    journal.append(scored({5: -2.0}), np.array([5]))
    journal.close()
    assert journal.resume(SETTINGS, ChoiceScores.empty(6, 64)) == len(expected) + 1
    journal.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"convention": "llamacpp"}, "convention was 'lm-eval' and is 'llamacpp'"),
        ({"model": "b" * 64}, "model was 'aaaaaaaaaaaa…' and is 'bbbbbbbbbbbb…'"),
        ({"bos": True}, "bos was None and is True"),
    ],
)
def test_what_differs_is_named(change, message, written, tmp_path):
    with pytest.raises(UsageError, match=message):
        Journal(tmp_path / "s.jsonl").resume(SETTINGS | change, ChoiceScores.empty(6, 64))


def test_nothing_to_resume(tmp_path):
    journal = Journal(tmp_path / "s.jsonl")
    assert journal.settings() is None
    journal.path.write_bytes(b'{"model"')  # killed while the first line was written
    assert journal.settings() is None


def test_one_run_at_a_time(written, tmp_path):
    first, second = Journal(tmp_path / "s.jsonl"), Journal(tmp_path / "s.jsonl")
    first.claim(resume=True)
    for resume in (True, False):
        with pytest.raises(UsageError, match="s.jsonl.partial: another process is writing it"):
            second.claim(resume)
        second.close()
    first.remove()
    second.claim(resume=False)  # nothing is there yet
    first.begin(SETTINGS)
    with pytest.raises(UsageError, match="s.jsonl.partial: another process has made it"):
        second.begin(SETTINGS)
    first.append(scored({5: -2.0}), np.array([5]))
    first.close()
    second.claim(resume=True)
    assert second.resume(SETTINGS, ChoiceScores.empty(6, 64)) == 1
    second.close()


def test_a_file_system_without_locks(written, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    journal = Journal(tmp_path / "s.jsonl")
    journal.claim(resume=True)
    assert journal.resume(SETTINGS, ChoiceScores.empty(6, 64)) == 3
    journal.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_full_in_mid_run(tmp_path):
    journal = Journal(tmp_path / "s.jsonl")
    journal.begin(SETTINGS)
    journal.append(scored({1: -7.25}), np.array([1]))
    journal.close()
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OutputError) as error:
        journal._file = full
        journal.append(scored({5: -2.0}), np.array([5]))
    assert str(error.value).endswith("s.jsonl.partial: cannot be written: No space left on device")
    assert "answers before are safe: --resume goes on" in error.value.hint
    journal._file = None
    assert journal.resume(SETTINGS, ChoiceScores.empty(6, 64)) == 1
    journal.close()


def test_a_line_is_json_a_person_can_read(written):
    assert json.loads(written.splitlines()[2]) == {
        "choices": [1],
        "loglikelihoods": [-7.25],
        "is_greedy": [False],
    }


def demo(*arguments):
    options = ("--demo", "--device", "cpu", "--limit", 12, "--micro-batch-tokens", 128)
    return CliRunner().invoke(cli, ["score", *map(str, options + arguments)])


def broken_run(tmp_path, monkeypatch):
    """What a run of `demo` leaves that was killed behind two micro-batches."""
    samples, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        assert demo("--samples", samples).exit_code == 0
    samples.unlink()
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:3]))
    return samples, partial


def test_answers_of_a_broken_run_are_not_lost_without_resume(tmp_path, monkeypatch):
    samples, partial = broken_run(tmp_path, monkeypatch)
    content = partial.read_bytes()
    again = demo("--samples", samples)
    assert again.exit_code == 2 and again.stdout == ""
    assert again.stderr == (
        f"cupyllama: {partial}: has answers of a run that has not ended\n"
        "  Go on with it by --resume, or delete it to score everything again.\n"
    )
    assert partial.read_bytes() == content and not samples.exists()
    for begun in (content.splitlines(keepends=True)[0], content[:40], b""):  # none to lose
        partial.write_bytes(begun)
        assert demo("--samples", samples).exit_code == 0
        assert os.listdir(tmp_path) == ["s.jsonl"]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        *((b"[]\n", 1), (b"[]", 1), (b'{"a": 1}\n', 1), (b"Dear diary,\n", 1), (b"Dear diary", 1)),
        *((b"[" * 100_000 + b"\n", 1), (b'{"a\n', 1)),
    ],
)
def test_a_file_that_is_no_journal_stays(content, line, resume, tmp_path):
    samples, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    partial.write_bytes(content)
    result = demo("--samples", samples, *resume)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert f"{partial}, line {line}: not what score writes there" in result.stderr
    assert "delete it" in result.stderr and "Traceback" not in result.stderr
    assert partial.read_bytes() == content and not samples.exists()


@pytest.mark.parametrize(
    "line",
    [
        *(b"[]", b"Dear diary", b"{}", b'{"choices": [0], "loglikelihoods": [1]}'),
        b'{"choices": [100000], "loglikelihoods": [-1.0], "is_greedy": [true]}',
        b'{"choices": [0, 1], "loglikelihoods": [-1.0, -2.0, -3.0], "is_greedy": [true]}',
        b'{"choices": [1e99], "loglikelihoods": [-1.0], "is_greedy": [true]}',
        b'{"choices": [0], "loglikelihoods": ["much"], "is_greedy": [true]}',
    ],
)
def test_a_line_without_answers_is_named(line, tmp_path, monkeypatch):
    samples, partial = broken_run(tmp_path, monkeypatch)
    with partial.open("ab") as file:
        file.write(line + b"\n")
    content = partial.read_bytes()
    result = demo("--samples", samples, "--resume")
    assert result.exit_code == 2, result.output
    assert f"{partial}, line 4: not what score writes there" in result.stderr
    assert partial.read_bytes() == content


def test_a_resumed_run_counts_what_it_did_itself(tmp_path, monkeypatch):
    samples, output = tmp_path / "s.jsonl", tmp_path / "r.json"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        assert demo("--samples", samples, "--output", output).exit_code == 0
    whole = json.loads(output.read_text())["cupyllama"]
    expected = samples.read_text()
    partial = tmp_path / "s.jsonl.partial"
    partial.write_bytes(b"".join(partial.read_bytes().splitlines(keepends=True)[:3]))
    samples.unlink()
    assert demo("--samples", samples, "--output", output, "--resume").exit_code == 0
    rest = json.loads(output.read_text())["cupyllama"]
    assert samples.read_text() == expected and not partial.exists()
    for count in ("tokens_asked", "tokens_computed"):
        assert 0 < rest[count] < whole[count]
    saved = [run["tokens_asked"] / run["tokens_computed"] for run in (whole, rest)]
    assert 0.7 < saved[1] / saved[0] < 1.4


def test_a_finished_run_is_not_scored_again(tmp_path):
    samples = tmp_path / "s.jsonl"
    assert demo("--samples", samples).exit_code == 0
    before = samples.read_bytes()
    # Perhaps with other settings: nothing in the file tells.
    again = demo("--samples", samples, "--resume", "--quantize", "fp8")
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr.startswith(f"cupyllama: {samples}: is finished, there is nothing to resume")
    assert samples.read_bytes() == before and os.listdir(tmp_path) == ["s.jsonl"]


def test_zeros_at_the_end_are_no_line(written, tmp_path):
    """As a power cut may leave them."""
    journal = Journal(tmp_path / "s.jsonl")
    journal.path.write_bytes(written + bytes(512))
    scores = ChoiceScores.empty(6, 64)
    assert journal.resume(SETTINGS, scores) == 3
    journal.append(scored({5: -1.0}), np.array([5]))
    journal.close()
    content = journal.path.read_bytes()
    assert content.startswith(written) and b"\0" not in content
    assert len(content.splitlines()) == 4


def test_a_link_has_its_files_journal(written, tmp_path):
    """A run by either name finds the answers of the other's."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "s.jsonl")
    journal = Journal(tmp_path / "folder" / "link")
    assert journal.path == (tmp_path / "s.jsonl.partial").resolve()
    journal.path.write_bytes(written)
    scores = ChoiceScores.empty(6, 64)
    assert journal.resume(SETTINGS, scores) == 3
    journal.remove()
    assert sorted(os.listdir(tmp_path)) == ["folder"]


def test_an_interrupted_run_says_where_its_answers_are(tmp_path, monkeypatch):
    append = Journal.append

    def last(self, *answers):
        append(self, *answers)
        raise KeyboardInterrupt

    samples = tmp_path / "s.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", last)
        result = demo("--samples", samples)
    kept = f"{samples}.partial has the answers so far: --resume goes on from there\n"
    assert result.exit_code == 130 and result.stderr.endswith(kept + "cupyllama: interrupted\n")
    assert demo("--samples", samples, "--resume").exit_code == 0
    assert os.listdir(tmp_path) == ["s.jsonl"]


def test_results_are_files_of_their_own(tmp_path):
    (tmp_path / "link").symlink_to("s.jsonl")
    for output in ("s.jsonl.partial", "link", "../" + tmp_path.name + "/s.jsonl"):
        result = demo("--samples", tmp_path / "s.jsonl", "--output", tmp_path / output)
        assert result.exit_code == 2 and "are the same file" in result.stderr, output
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_cannot_be_written_keeps_nothing_else_from_it(tmp_path):
    result = demo("--output", "/dev/full", "--trace", tmp_path / "t.json")
    assert result.exit_code == 1 and "* acc_norm" in result.stdout
    assert "/dev/full: cannot be written: No space left on device" in result.stderr
    assert json.loads((tmp_path / "t.json").read_text())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("full", ["--output", "--trace"])
def test_a_file_that_cannot_be_written_costs_no_answers(full, tmp_path):
    """The disk is full at the end of a run."""
    samples, partial = tmp_path / "s.jsonl", tmp_path / "s.jsonl.partial"
    paths = {"--output": tmp_path / "r.json", "--trace": tmp_path / "t.json"}
    arguments = [argument for pair in (paths | {full: "/dev/full"}).items() for argument in pair]
    result = demo("--samples", samples, *arguments)
    assert result.exit_code == 1 and "* acc_norm" in result.stdout
    assert "/dev/full: cannot be written: No space left on device" in result.stderr
    assert f"{partial}: with --resume they are written" in result.stderr
    assert partial.exists()
    before = samples.read_bytes()
    samples.unlink()
    arguments = [argument for pair in paths.items() for argument in pair]
    again = demo("--samples", samples, *arguments, "--resume")
    assert again.exit_code == 0, again.output
    lines = result.stdout.splitlines()[:8]
    assert again.stdout.splitlines()[:8] == lines and lines[4].startswith("  acc ")
    assert samples.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["r.json", "s.jsonl", "t.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_without_samples_the_table_is_what_is_left(tmp_path):
    result = demo("--output", "/dev/full")
    assert result.exit_code == 1 and "* acc_norm" in result.stdout
    assert "/dev/full: cannot be written" in result.stderr and "--resume" not in result.stderr
