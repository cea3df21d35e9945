"""Log-likelihoods against Hugging Face transformers, recorded by tools/record_transformers.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from engine import build_stage, question_rows, score_rows
from tiny_models import write_tiny_model

RECORDED = json.loads(
    (Path(__file__).parent / "data" / "transformers_loglikelihoods.json").read_text()
)["models"]


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_loglikelihoods_equal_transformers(name, tmp_path):
    stage = build_stage(write_tiny_model(name, tmp_path))
    questions = RECORDED[name]
    scores = score_rows(stage, question_rows(questions))
    expected = np.concatenate([question["loglikelihoods"] for question in questions])
    np.testing.assert_allclose(scores.loglikelihoods, expected, rtol=0, atol=1e-4)
    greedy = np.concatenate([question["is_greedy"] for question in questions])
    np.testing.assert_array_equal(scores.is_greedy, greedy)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_hold_the_same_model(shards, tmp_path):
    rows = question_rows(RECORDED["gqa"])
    whole = score_rows(build_stage(write_tiny_model("gqa", tmp_path / "whole")), rows)
    parts = write_tiny_model("gqa", tmp_path / "parts", shards=shards)
    np.testing.assert_array_equal(
        score_rows(build_stage(parts), rows).loglikelihoods, whole.loglikelihoods
    )
