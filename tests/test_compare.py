"""Two runs compared: figures worked by hand, by brute force, and through the command line."""

import itertools
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyllama.cli import cli
from cupyllama.compare import check_questions, compare, mcnemar, read_samples
from cupyllama.errors import DataError
from cupyllama.report import Answers
from cupyllama.tasks.question import Question


@pytest.mark.parametrize(
    ("right_to_wrong", "wrong_to_right", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · 1/2
        (3, 3, 1.0),  # the middle would count twice
        (0, 5, 2 / 32),
        (6, 1, 2 * (1 + 7) / 128),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (0, 100, 2 / 2**100),
        (0, 2000, 0.0),  # 2 / 2**2000 is below all floats, and 2**2000 above them
    ],
)
def test_mcnemar_by_hand(right_to_wrong, wrong_to_right, p_value):
    assert mcnemar(right_to_wrong, wrong_to_right) == p_value
    assert mcnemar(wrong_to_right, right_to_wrong) == p_value


def test_mcnemar_of_many_changes_is_near_the_normal_distribution():
    # z = (|4900 - 5100| - 1) / √10000 = 1.99; twice the tail beyond it is 0.04659
    assert mcnemar(4900, 5100) == pytest.approx(0.04659, rel=1e-3)
    assert mcnemar(15_000, 15_000) == 1.0


@given(st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_mcnemar_counts_the_tosses_that_are_as_one_sided(right_to_wrong, tosses):
    right_to_wrong = min(right_to_wrong, tosses)
    seen = abs(2 * right_to_wrong - tosses)
    heads = map(sum, itertools.product((0, 1), repeat=tosses))
    extreme = sum(abs(2 * count - tosses) >= seen for count in heads)
    assert mcnemar(right_to_wrong, tosses - right_to_wrong) == extreme / 2**tosses


def answers_of(questions, loglikelihoods, num_tokens) -> Answers:
    starts = np.cumsum([0, *(len(question.choices) for question in questions)])
    flags = np.zeros(starts[-1], bool)
    return Answers(questions, starts, np.array(loglikelihoods), flags, np.array(num_tokens))


def write(path, samples):
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@st.composite
def two_runs(draw):
    """Questions, one run's answers to the first of them, and another's samples of some of them.

    Few values, so that ties, equal runs and changes of equal size are common.
    """
    texts = st.lists(st.sampled_from(["a", "bb", "cccc"]), min_size=1, max_size=4)
    questions = [
        Question("q", tuple(choices), draw(st.integers(0, len(choices) - 1)))
        for choices in draw(st.lists(texts, min_size=1, max_size=7))
    ]
    values = st.integers(-6, 0).map(lambda eighths: eighths / 8)
    asked = questions[: draw(st.integers(1, len(questions)))]
    choices = sum(len(question.choices) for question in asked)
    mine = [draw(values) for _ in range(choices)], [draw(st.integers(1, 2)) for _ in range(choices)]
    order = draw(st.permutations(range(len(questions))))
    order = order[: draw(st.integers(1, len(order)))]
    samples = []
    for doc_id in order:
        count = len(questions[doc_id].choices)
        samples.append(
            {
                "doc_id": doc_id,
                "gold": questions[doc_id].gold,
                "loglikelihoods": [draw(values) for _ in range(count)],
                "num_tokens": [draw(st.integers(1, 2)) for _ in range(count)],
                "is_greedy": [False] * count,
                "pred": draw(st.integers(0, count - 1)),
                "pred_norm": draw(st.integers(0, count - 1)),
            }
        )
    return questions, answers_of(asked, *mine), samples


@given(runs=two_runs())
@settings(max_examples=200, deadline=None)
def test_compared_one_question_at_a_time(runs, tmp_path_factory):
    questions, answers, samples = runs
    other = read_samples(write(tmp_path_factory.getbasetemp() / "other.jsonl", samples))
    here = {sample["doc_id"]: sample for sample in answers.samples()}
    pairs = [(s, here[s["doc_id"]]) for s in samples if s["doc_id"] in here]
    if not pairs:
        with pytest.raises(DataError, match="this run ends with"):
            check_questions(other, questions, len(here))
        return
    check_questions(other, questions, len(here))
    found = compare(other, answers)
    assert found.questions == len(pairs)
    assert found.only_here == len(here) - len(pairs)
    assert found.only_there == len(samples) - len(pairs)
    for name, field in [("acc", "pred"), ("acc_norm", "pred_norm")]:
        picks = [(old[field], new[field], old["gold"]) for old, new in pairs]
        pick = found.picks[name]
        assert pick.flipped == sum(old != new for old, new, _ in picks)
        assert pick.right_to_wrong == sum(old == gold != new for old, new, gold in picks)
        assert pick.wrong_to_right == sum(old != gold == new for old, new, gold in picks)
        assert pick.before == sum(old == gold for old, _, gold in picks) / len(picks)
        assert pick.after == sum(new == gold for _, new, gold in picks) / len(picks)
        assert pick.p_value == mcnemar(pick.right_to_wrong, pick.wrong_to_right)
    changes = {
        (old["doc_id"], choice): after - before
        for old, new in sorted(pairs, key=lambda pair: pair[0]["doc_id"])
        for choice, (before, after) in enumerate(
            zip(old["loglikelihoods"], new["loglikelihoods"], strict=True)
        )
    }
    change = found.loglikelihoods
    assert change.choices == len(changes)
    assert change.mean == pytest.approx(sum(changes.values()) / len(changes))
    assert change.mean_absolute == pytest.approx(sum(map(abs, changes.values())) / len(changes))
    most = max(changes, key=lambda place: abs(changes[place]))  # the first of equals
    assert (change.largest_doc_id, change.largest_choice) == most
    assert change.largest == changes[most]
    assert change.other_num_tokens == sum(
        old["num_tokens"] != new["num_tokens"] for old, new in pairs
    )
    assert ("none changed" in found.as_text()) == (not any(changes.values()))


SAMPLE = {
    "doc_id": 1,
    "gold": 0,
    "loglikelihoods": [-2.5, -3],
    "num_tokens": [1, 2],
    "is_greedy": [False, True],
    "pred": 0,
    "pred_norm": 1,
}
# as Journal.begin writes it, and then the answers
JOURNAL = [{"model": "f" * 64, "bos": True, "micro_batch_tokens": 64}, {"choices": [0]}]


@pytest.mark.parametrize("end", ["\n", "", "\r\n\r\n"])
def test_lines_as_editors_leave_them(tmp_path, end):
    path = tmp_path / "s.jsonl"
    text = "\ufeff" + json.dumps(SAMPLE) + "\n\n" + json.dumps(SAMPLE | {"doc_id": 0}) + end
    path.write_bytes(text.encode())
    samples = read_samples(path).samples
    assert [(doc_id, sample.line) for doc_id, sample in samples.items()] == [(1, 1), (0, 3)]
    assert (samples[1].gold, samples[1].pred, samples[1].pred_norm) == (0, 0, 1)
    assert (samples[1].loglikelihoods, samples[1].num_tokens) == ([-2.5, -3], [1, 2])


def without(key):
    return [{name: value for name, value in SAMPLE.items() if name != key}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no samples"),
        ([SAMPLE, '{"doc_id": 2, "go'], "line 2: not JSON: "),
        (["[" * 100_000], "line 1: not JSON: "),
        ([b"\xff\xfe"], "line 1: not JSON: "),
        ([[1, 2]], "line 1: not a JSON object"),
        *((without(key), f"line 1: has no field '{key}'") for key in SAMPLE if key != "is_greedy"),
        ([SAMPLE, "", SAMPLE], "line 3: doc_id 1 was in line 1 already"),
        (JOURNAL, "is the journal of a run that has not ended"),
        ([SAMPLE | {"doc_id": -1}], "line 1: doc_id is -1, not a number from 0 on"),
        ([SAMPLE | {"doc_id": "1"}], "doc_id is '1', not a number"),
        ([SAMPLE | {"gold": True}], "gold is True, not a number"),
        ([SAMPLE | {"gold": 2}], "gold is 2, and there are 2 choices"),
        ([SAMPLE | {"pred": 0.0}], "pred is 0.0, not a number"),
        ([SAMPLE | {"pred_norm": 2}], "pred_norm is 2, and there are 2 choices"),
        ([SAMPLE | {"loglikelihoods": []}], "loglikelihoods is not a list"),
        ([SAMPLE | {"loglikelihoods": -1.0}], "loglikelihoods is not a list"),
        ([SAMPLE | {"loglikelihoods": [-1.0, None]}], "None is no log-likelihood"),
        ([SAMPLE | {"loglikelihoods": [-1.0, float("nan")]}], "nan is no log-likelihood"),
        ([SAMPLE | {"loglikelihoods": [float("-inf"), -1]}], "-inf is no log-likelihood"),
        ([SAMPLE | {"loglikelihoods": [-1, -(10**400)]}], "is no log-likelihood"),
        ([SAMPLE | {"num_tokens": [1]}], "num_tokens is not a list of 2 numbers"),
        ([SAMPLE | {"num_tokens": [1, "2"]}], "num_tokens is '2', not a number"),
    ],
)
def test_what_is_no_samples_file_is_refused(tmp_path, lines, message):
    path = tmp_path / "s.jsonl"
    lines = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as error:
        read_samples(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert error.value.hint and len(str(error.value)) < len(str(path)) + 200


QUESTIONS = [Question("q", ("a", "b"), 0, place="q.jsonl, line 7")] * 3


@pytest.mark.parametrize(
    ("change", "asked", "message", "hint"),
    [
        ({"doc_id": 3}, 3, "line 1: doc_id 3 is none of the 3 questions", "--data"),
        ({"gold": 1}, 3, r"gold is 1, and 0 in question 1 \(q.jsonl, line 7\)", "--data"),
        (
            {"loglikelihoods": [-1] * 3, "num_tokens": [1] * 3},
            3,
            r"line 1: has 3 choices, and question 1 \(q.jsonl, line 7\) has 2",
            "--data",
        ),
        ({}, 1, "begins with question 1, and this run ends with 0", "--limit of 2 or more"),
    ],
)
def test_other_questions_are_refused(tmp_path, change, asked, message, hint):
    other = read_samples(write(tmp_path / "s.jsonl", [SAMPLE | change]))
    with pytest.raises(DataError, match=message) as error:
        check_questions(other, QUESTIONS, asked)
    assert hint in error.value.hint


def test_other_numbers_of_tokens_are_said(tmp_path):
    answers = answers_of(QUESTIONS, [-1.0] * 6, [1, 2, 1, 1, 1, 2])
    found = compare(read_samples(write(tmp_path / "s.jsonl", [SAMPLE])), answers)
    assert found.loglikelihoods.other_num_tokens == 1
    assert "1 question scored on other numbers of tokens" in found.as_text()


def demo(*arguments):
    fixed = ["score", "--demo", "--device", "cpu", "--quiet"]
    return CliRunner().invoke(cli, [*fixed, *map(str, arguments)])


@pytest.fixture(scope="module")
def first_eight(tmp_path_factory):
    """Samples of the demo's first eight questions."""
    path = tmp_path_factory.mktemp("compare") / "a.jsonl"
    result = demo("--limit", 8, "--samples", path)
    assert result.exit_code == 0, result.output
    return path


def compared(tmp_path, other, *arguments):
    """What the results file says, and what is printed."""
    result = demo("--compare", other, "--output", tmp_path / "r.json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "r.json").read_text()), result.stdout


def test_the_same_run_again_changes_nothing(tmp_path, first_eight):
    results, text = compared(tmp_path, first_eight, "--limit", 8)
    found = results["cupyllama"]["comparison"]
    assert (found["questions"], found["only_here"], found["only_there"]) == (8, 0, 0)
    for name in ("acc", "acc_norm"):
        accuracy = results["results"]["demo"][f"{name},none"]
        assert found["picks"][name] == {
            "before": accuracy,
            "after": accuracy,
            "flipped": 0,
            "right_to_wrong": 0,
            "wrong_to_right": 0,
            "p_value": 1.0,
        }
    assert found["loglikelihoods"]["choices"] == 32
    for name in ("mean", "mean_absolute", "largest", "other_num_tokens"):
        assert found["loglikelihoods"][name] == 0
    table, comparison = text.split("\n\n")[1], text.split("\n\n")[-1]
    assert "± stderr" in table and "log-likelihoods of 32 choices: none changed" in comparison


def test_changes_made_by_hand_are_found_exactly(tmp_path, first_eight):
    lines = [json.loads(line) for line in first_eight.read_text().splitlines()]
    right = [line for line in lines if line["pred"] == line["gold"]]
    wrong = [line for line in lines if line["pred"] != line["gold"]]
    right_norm = [line for line in lines if line["pred_norm"] == line["gold"]]
    wrong_norm = [line for line in lines if line["pred_norm"] != line["gold"]]
    assert len(right) >= 5 and wrong and wrong_norm
    for line in right[:5]:  # were wrong
        line["pred"] = (line["gold"] + 1) % 4
    # was wrong, but another way: a flip, and no change of accuracy
    wrong[0]["pred"] = ({0, 1, 2, 3} - {wrong[0]["gold"], wrong[0]["pred"]}).pop()
    wrong_norm[0]["pred_norm"] = wrong_norm[0]["gold"]  # was right
    lines[3]["loglikelihoods"][2] += 0.5
    lines[5]["loglikelihoods"][0] -= 0.25
    other = write(tmp_path / "edited.jsonl", reversed(lines))
    results, text = compared(tmp_path, other, "--limit", 8)
    found = results["cupyllama"]["comparison"]
    assert found["path"] == str(other)
    assert found["picks"]["acc"] == {
        "before": (len(right) - 5) / 8,
        "after": len(right) / 8,
        "flipped": 6,
        "right_to_wrong": 0,
        "wrong_to_right": 5,
        "p_value": 2 / 32,
    }
    assert found["picks"]["acc_norm"] == {
        "before": (len(right_norm) + 1) / 8,
        "after": len(right_norm) / 8,
        "flipped": 1,
        "right_to_wrong": 1,
        "wrong_to_right": 0,
        "p_value": 1.0,
    }
    assert found["loglikelihoods"] == {
        "choices": 32,
        "mean": pytest.approx(-0.25 / 32),
        "mean_absolute": pytest.approx(0.75 / 32),
        "largest": pytest.approx(-0.5),
        "largest_doc_id": 3,
        "largest_choice": 2,
        "other_num_tokens": 0,
    }
    rows = [line.split() for line in text.splitlines()]
    percent = [f"{100 * (len(right) - gone) / 8:.2f}" for gone in (5, 0)]
    assert ["acc", *percent, "6", "0", "5", "0.0625"] in rows
    assert "most in question 3, choice 2: -0.5" in text


def test_a_part_of_the_questions(tmp_path, first_eight):
    found = compared(tmp_path, first_eight, "--limit", 5)[0]["cupyllama"]["comparison"]
    assert (found["questions"], found["only_here"], found["only_there"]) == (5, 0, 3)
    assert found["loglikelihoods"]["choices"] == 20
    results, text = compared(tmp_path, first_eight, "--limit", 10)
    found = results["cupyllama"]["comparison"]
    assert (found["questions"], found["only_here"], found["only_there"]) == (8, 2, 0)
    assert "a.jsonl: 8 questions; 2 more in this run alone" in text


def refused(tmp_path, *parts, compare, limit=8):
    """Exit code 4, one line and a hint, and no file of the run."""
    before = sorted(os.listdir(tmp_path))
    outputs = ["--output", tmp_path / "r.json", "--samples", tmp_path / "r.jsonl"]
    result = demo("--limit", limit, "--compare", compare, *outputs)
    assert result.exit_code == 4 and result.stdout == "", result.output
    said = result.stderr.strip().split("\n")
    assert len(said) == 2 and all(part in result.stderr for part in parts), result.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_cannot_be_compared_with_is_refused_before_loading(
    tmp_path, first_eight, monkeypatch
):
    def load(*arguments):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("cupyllama.rank.BackgroundLoad", load)
    refused(
        tmp_path, "nowhere.jsonl: No such file", "--samples", compare=tmp_path / "nowhere.jsonl"
    )
    (tmp_path / "d").mkdir()
    write(tmp_path / "d.partial", JOURNAL)
    refused(tmp_path, "d: Is a directory", "--samples", compare=tmp_path / "d")
    write(tmp_path / "s.jsonl.partial", JOURNAL)
    refused(tmp_path, "s.jsonl.partial is of a run", "--resume", compare=tmp_path / "s.jsonl")
    refused(tmp_path, "is the journal", "--resume", compare=tmp_path / "s.jsonl.partial")
    write(tmp_path / "bad.jsonl", [SAMPLE, {"doc_id": 2}])
    refused(tmp_path, "bad.jsonl, line 2: has no field", compare=tmp_path / "bad.jsonl")


def test_other_questions_are_refused_before_the_run(tmp_path, first_eight, monkeypatch):
    def begin(*arguments):
        raise AssertionError("the run begins")

    monkeypatch.setattr("cupyllama.score.Run.pack_and_load", begin)
    lines = [json.loads(line) for line in first_eight.read_text().splitlines()]
    lines[6]["gold"] = (lines[6]["gold"] + 1) % 4
    other = write(tmp_path / "gold.jsonl", lines)
    refused(tmp_path, "gold.jsonl, line 7: gold is", "questions.jsonl, line 7", compare=other)
    write(other, [lines[5]])
    refused(tmp_path, "this run ends with 3", "--limit of 6 or more", compare=other, limit=4)
    dry = demo("--dry-run", "--limit", "4", "--compare", other)
    assert dry.exit_code == 4 and dry.stdout == ""


def test_rank_0_of_several_compares(tmp_path, first_eight):
    pytest.importorskip("mpi4py")
    import test_ranks

    if test_ranks.MPIRUN is None:
        pytest.skip("needs mpirun")
    fixed = ["score", "--demo", "--device", "cpu", "--quiet", "--limit", 8, "--compare"]
    result = test_ranks.mpirun(2, *fixed, first_eight)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("a.jsonl: 8 questions\n") == 1
    assert result.stdout.count("none changed") == 1
    wrong = test_ranks.mpirun(2, *fixed, tmp_path / "nowhere.jsonl")
    test_ranks.ends(wrong, 4, "nowhere.jsonl: No such file")
    lines = [json.loads(line) for line in first_eight.read_text().splitlines()]
    other = write(tmp_path / "other.jsonl", [lines[0] | {"doc_id": 400}])
    test_ranks.ends(test_ranks.mpirun(2, *fixed, other), 4, "doc_id 400 is none of the 400")
