"""The journal: what was answered is there after a kill at any byte."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from cupyllama.cli import cli
from cupyllama.errors import UsageError
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


def test_a_line_is_json_a_person_can_read(written):
    assert json.loads(written.splitlines()[2]) == {
        "choices": [1],
        "loglikelihoods": [-7.25],
        "is_greedy": [False],
    }


def demo(*arguments):
    options = ("--demo", "--device", "cpu", "--limit", 12, "--micro-batch-tokens", 128)
    return CliRunner().invoke(cli, ["score", *map(str, options + arguments)])


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
    again = demo("--samples", samples, "--resume", "--quantize", "fp8")
    assert again.exit_code == 2 and "s.jsonl: is finished" in again.stderr
    assert samples.read_bytes() == before
