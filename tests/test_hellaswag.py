"""HellaSwag's text as lm-eval makes it, and as the other conventions do."""

import json
from pathlib import Path

import pytest

from cupyllama.tasks import hellaswag

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "hellaswag_awkward_lm_eval.json").read_text())["documents"]
RECORDS = [
    json.loads(line) for line in (DATA / "hellaswag_awkward.jsonl").read_text().split("\n") if line
]


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_text_equals_lm_eval(number):
    question = hellaswag.question(RECORDS[number], "lm-eval")
    expected = RECORDED[number]
    assert question.context == expected["query"]
    assert list(question.choices) == expected["choices"]
    assert question.gold == expected["gold"]


def test_fastertransformer_keeps_ctx_and_loses_the_space_after_the_colon():
    record = {
        "activity_label": "Roof  removal",
        "ctx_a": "A man sits.",
        "ctx_b": "he",
        "ctx": "A man [substeps] rises. he",  # which is what counts, whatever ctx_a says
        "endings": ["is [x]ripping.", " falls. "],
        "label": "1",
    }
    question = hellaswag.question(record, "fastertransformer")
    assert question.context == "Roof removal:A man rises. he"
    assert question.choices == ("is ripping.", "falls.")
    assert question.gold == 1
    assert hellaswag.question(record, "llamacpp").context == "Roof removal: A man sits. He"
    del record["ctx"]
    joined = hellaswag.question(record, "fastertransformer")
    assert joined.context == "Roof removal:A man sits. he"


def test_six_lines_are_taken_as_they_are():
    lines = ("Roof: A man [x]. he", "2", ["a", "b", "c", "d"])
    assert hellaswag.question_from_lines(*lines, "lm-eval").context == "Roof: A man [x]. he"
    twice = ("Roof: A man: he", "0", ["a"])
    apart = hellaswag.question_from_lines(*twice, "fastertransformer")
    assert apart.context == "Roof:A man: he"  # the colon of the label alone
    apart = hellaswag.question_from_lines(*lines, "fastertransformer")
    assert apart.context == "Roof:A man [x]. he" and apart.gold == 2
