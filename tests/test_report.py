"""Accuracies worked by hand, and result files that are there whole or not at all."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cupyllama.compare import Comparison, LoglikelihoodChange, PickChange
from cupyllama.errors import OutputError
from cupyllama.files import check_writable, write_json, write_json_lines
from cupyllama.report import Answers, Metric, RankReport, Report
from cupyllama.tasks.question import Question
from cupyllama.trace import Span

QUESTIONS = [
    Question("a", ("xx", "yyyy"), 1),  # per character the longer one wins
    Question("b", ("é", "zz"), 0),  # é: one character, two bytes
    Question("c", ("p", "q", "r"), 2),  # equal: the first is picked
]
ANSWERS = Answers(
    QUESTIONS,
    choice_start=np.array([0, 2, 4, 7]),
    loglikelihoods=np.array([-4.0, -6.0, -3.0, -3.5, -1.0, -1.0, -1.0]),
    is_greedy=np.array([True, False, False, False, True, False, False]),
    num_tokens=np.array([1, 2, 1, 3, 1, 1, 1]),
)


def test_accuracy_under_each_normalisation():
    picks = {name: picked.tolist() for name, picked in ANSWERS.picks.items()}
    assert picks == {
        "acc": [0, 0, 0],  # -4 > -6; -3 > -3.5
        "acc_norm": [1, 1, 0],  # -2 < -1.5; -3 < -1.75
        "acc_bytes": [1, 0, 0],  # -1.5 > -1.75
        "acc_tokens": [1, 1, 0],  # -4 < -3; -3 < -1.17
    }
    metrics = ANSWERS.metrics()
    assert metrics["acc"].value == pytest.approx(1 / 3)
    assert metrics["acc_bytes"].value == pytest.approx(2 / 3)
    # sample variance of [1, 1, 0] is 1/3; its root over √3 is 1/3
    assert metrics["acc_bytes"].stderr == pytest.approx(1 / 3)


def test_one_question_has_no_standard_error():
    one = Answers(QUESTIONS[:1], np.array([0, 2]), np.zeros(2), np.ones(2, bool), np.ones(2))
    assert math.isnan(one.metrics()["acc"].stderr)


def test_samples():
    assert list(ANSWERS.samples())[1] == {
        "doc_id": 1,
        "gold": 0,
        "loglikelihoods": [-3.0, -3.5],
        "num_tokens": [1, 3],
        "is_greedy": [False, False],
        "pred": 0,
        "pred_norm": 1,
    }


def test_pred_norm_is_the_pick_per_character():
    """Over a question whose pick is another one per token, and another one per byte."""
    one = Answers(
        [Question("a", ("xx", "yyyy", "éé"), 1)],
        choice_start=np.array([0, 3]),
        loglikelihoods=np.array([-4.0, -6.0, -3.1]),
        is_greedy=np.ones(3, bool),
        num_tokens=np.array([8, 2, 1]),
    )
    picks = {name: int(pick[0]) for name, pick in one.picks.items()}
    # -2, -1.5, -1.55 per character; -2, -1.5, -0.775 per byte; -0.5, -3, -3.1 per token
    assert picks == {"acc": 2, "acc_norm": 1, "acc_bytes": 2, "acc_tokens": 0}
    (sample,) = one.samples()
    assert (sample["pred"], sample["pred_norm"]) == (2, 1)


COMPARISON = Comparison(
    path=Path("other.jsonl"),
    questions=1500,
    only_here=0,
    only_there=3,
    picks={"acc": PickChange(0.25, 0.125, 1234, 8, 2, 0.0703125)},
    loglikelihoods=LoglikelihoodChange(6000, 0.001, 0.0125, -7.5, 12, 3, 1),
)


def test_a_comparison_says_each_number_under_its_own_name():
    assert COMPARISON.as_text().splitlines() == [
        "  compared with other.jsonl: 1,500 questions; 3 more in that one alone",
        "  accuracy     before   after  flipped  right->wrong  wrong->right   p (McNemar)",
        "  acc           25.00   12.50    1,234             8             2   0.0703",
        "  log-likelihoods of 6,000 choices: changed by +0.001 on average, 0.0125 in absolute "
        "value;",
        "  most in question 12, choice 3: -7.5",
        "  1 question scored on other numbers of tokens: another tokenizer or convention",
    ]
    assert COMPARISON.as_json() == {
        "path": "other.jsonl",
        "questions": 1500,
        "only_here": 0,
        "only_there": 3,
        "picks": {
            "acc": {
                "before": 0.25,
                "after": 0.125,
                "flipped": 1234,
                "right_to_wrong": 8,
                "wrong_to_right": 2,
                "p_value": 0.0703125,
            }
        },
        "loglikelihoods": {
            "choices": 6000,
            "mean": 0.001,
            "mean_absolute": 0.0125,
            "largest": -7.5,
            "largest_doc_id": 12,
            "largest_choice": 3,
            "other_num_tokens": 1,
        },
    }


REPORT = {
    "task": "t",
    "metrics": {"acc": Metric(0.25, 0.05), "acc_norm": Metric(0.5, math.nan)},
    "headline": "acc_norm",
    "questions": 30,
    "questions_in_file": 100,
    "questions_scored": 30,
    "tokens_asked": 9000,
    "tokens_computed": 4000,
    "truncated_rows": 3,
    "seconds": {"loading": 2.0, "preparing": 3.0, "evaluating": 5.0},
    "total_seconds": 60.0,
    "settings": {
        "model": "m",
        "convention": "c",
        "bos": True,
        "dtype": "d",
        "quantize": "none",
        "device": "p",
    },
    "digests": {"model": "x"},
    "versions": {"python": "3"},
    "date": 123.0,
    "ranks": [SimpleNamespace(busy=0.75, place="host/cpu", as_json=dict)],
}


def test_the_report_says_each_number_under_its_own_name():
    report = Report(**REPORT)
    found = report.as_json()
    assert found["n-samples"] == {"t": {"original": 100, "effective": 30}}
    assert found["results"]["t"] == {
        "alias": "t",
        "acc,none": 0.25,
        "acc_stderr,none": 0.05,
        "acc_norm,none": 0.5,
        "acc_norm_stderr,none": None,
    }
    extra = found["cupyllama"]
    assert extra["questions_per_second"] == 6.0  # of the five seconds of evaluation
    assert (extra["tokens_asked"], extra["tokens_computed"]) == (9000, 4000)
    assert (extra["headline"], extra["truncated_rows"]) == ("acc_norm", 3)
    assert float(found["total_evaluation_time_seconds"]) == 60.0
    text = report.as_text()
    for part in ("t: 30 questions", "* acc_norm", "  acc  ", "6.0 questions/s", "2.25 times"):
        assert part in text
    assert extra["comparison"] is None and "compared" not in text
    compared = replace(report, comparison=COMPARISON)
    assert compared.as_json()["cupyllama"]["comparison"]["picks"]["acc"]["p_value"] == 0.0703125
    # after all that was there before, which it does not change
    assert compared.as_text() == f"{text}\n\n{COMPARISON.as_text()}"


def rank_report(number, replica, tensor_rank, micro_batches, seconds):
    """Of a rank that computes a micro-batch a second in a run of so many seconds."""
    return RankReport(
        rank=number,
        replica=replica,
        layers=(0, 6),
        device="d",
        bytes_read=0,
        micro_batches=micro_batches,
        busy=micro_batches / seconds,
        place=f"host/{number}",
        link_seconds=None,
        spans=[Span("compute", i, i, i + 1) for i in range(micro_batches)],
        tensor_rank=tensor_rank,
        tensor_parallel=2,
    )


def test_both_bubbles_are_of_all_replicas():
    """Two of one stage, of which the second has one micro-batch to the first one's three."""
    ranks = [rank_report(2 * r + t, r, t, (3, 1)[r], 4.0) for r in range(2) for t in range(2)]
    report = REPORT | {"ranks": ranks}
    text, found = Report(**report).as_text(), Report(**report).as_json()["cupyllama"]
    assert "bubble 50.0%; simulated 33.3%, 3.0 s" in text  # 1 - 8/16, and 1 - 4/6
    assert (found["bubble"], found["simulated_seconds"]) == (0.5, 3.0)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [2, "é"]})
    assert json.loads(path.read_text()) == {"a": [2, "é"]}
    write_json_lines(tmp_path / "samples.jsonl", [{"b": 1}, {"b": 2}])
    assert (tmp_path / "samples.jsonl").read_text() == '{"b": 1}\n{"b": 2}\n'
    assert sorted(os.listdir(tmp_path)) == ["results.json", "samples.jsonl"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")
    real_open = open

    def full(name, *arguments, **options):
        real_open(name, "w").close()
        return real_open("/dev/full", *arguments, **options)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OutputError, match="results.json: cannot be written: No space left") as e:
        write_json(path, {"a": 1})
    monkeypatch.undo()
    assert e.value.exit_code == 1
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_what_cannot_be_written_is_found_before_the_run(tmp_path):
    check_writable(tmp_path / "new.json")
    assert os.listdir(tmp_path) == []
    with pytest.raises(OutputError, match="No such file or directory"):
        check_writable(tmp_path / "nowhere" / "new.json")
    with pytest.raises(OutputError, match="is a directory"):
        check_writable(tmp_path)
