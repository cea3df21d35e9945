"""Packed equals unpacked, and a run that goes on when memory ends."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from engine import build_stage, question_rows, score_rows
from tiny_models import write_tiny_model

from cupyllama.errors import DeviceError
from cupyllama.evaluate import ChoiceScores, Line, evaluate, plan
from cupyllama.ops import reference
from cupyllama.packing import TokenRow

RECORDED = json.loads(
    (Path(__file__).parent / "data" / "transformers_loglikelihoods.json").read_text()
)["models"]


def random_rows(rng: np.random.Generator, questions: int, vocab: int = 300) -> list[TokenRow]:
    """Choices that share contexts, and contexts that share beginnings."""
    rows: list[TokenRow] = []
    beginning = rng.integers(3, vocab, 12).tolist()
    for _ in range(questions):
        context = [1, *beginning[: rng.integers(0, 12)]]
        context += rng.integers(3, vocab, rng.integers(0, 30)).tolist()
        for _ in range(rng.integers(1, 5)):
            choice = rng.integers(3, vocab, rng.integers(1, 12)).tolist()
            rows.append(TokenRow(context + choice, len(context), len(rows)))
    return rows


@pytest.mark.parametrize("name", ["gqa", "llama3_rope", "attention_bias", "odd", "opt", "opt_350m"])
def test_packed_equals_one_row_at_a_time(name, tmp_path):
    stage = build_stage(write_tiny_model(name, tmp_path))
    rng = np.random.default_rng()
    print("seed", rng.bit_generator.seed_seq.entropy)
    rows = random_rows(rng, 12)
    alone = []
    for row in rows:
        scores = score_rows(stage, [TokenRow(row.token_ids, row.first_target, 0)])
        alone.append(scores.loglikelihoods[0])
    for micro_batch_tokens in (64, 100, 1000):
        packed = score_rows(stage, rows, micro_batch_tokens)
        # 1e-5 a token: float32 holds a log-likelihood of 100 nats to no more than that
        targets = [len(row.token_ids) - row.first_target for row in rows]
        assert (np.abs(packed.loglikelihoods - alone) / targets).max() < 1e-5
    assert packed.tokens_computed < sum(len(row.token_ids) - 1 for row in rows)


def forgetful(limit: int, failures: list[int]) -> types.SimpleNamespace:
    """The reference operations on a device that cannot hold more than `limit` tokens."""
    ops = types.SimpleNamespace(**vars(reference))

    def linear_swiglu(x, *rest):
        if len(x) > limit:
            failures.append(len(x))
            raise MemoryError
        return reference.linear_swiglu(x, *rest)

    ops.linear_swiglu = linear_swiglu
    return ops


def test_out_of_memory_halves_the_micro_batch_and_goes_on(tmp_path):
    model = write_tiny_model("gqa", tmp_path)
    rows = question_rows(RECORDED["gqa"])
    expected = score_rows(build_stage(model), rows).loglikelihoods
    failures, halved, done = [], [], []
    stage = build_stage(model, forgetful(150, failures))
    scores = ChoiceScores.empty(len(rows), 512)
    evaluate(Line(stage), rows, plan(rows, 512, stage.ops), scores, done.extend, halved.append)
    assert failures and halved == [256, 128]
    assert scores.micro_batch_tokens == [512, 256, 128]
    np.testing.assert_allclose(scores.loglikelihoods, expected, atol=1e-4)
    assert sorted(done) == list(range(len(rows)))


def test_memory_that_ends_half_way_keeps_what_is_done(tmp_path):
    model = write_tiny_model("gqa", tmp_path)
    rows = question_rows(RECORDED["gqa"])
    expected = score_rows(build_stage(model), rows).loglikelihoods
    stage = build_stage(model)
    calls = []

    def attention(qkv, *rest):
        calls.append(len(qkv))
        if len(calls) == 3:
            raise MemoryError
        return reference.attention(qkv, *rest)

    stage.ops = types.SimpleNamespace(**{**vars(reference), "attention": attention})
    done = []
    scores = ChoiceScores.empty(len(rows), 128)
    evaluate(Line(stage), rows, plan(rows, 128, stage.ops), scores, done.extend)
    np.testing.assert_allclose(scores.loglikelihoods, expected, atol=1e-4)
    assert sorted(done) == list(range(len(rows)))  # none twice
    assert scores.micro_batch_tokens[0] == 128 and 64 <= scores.micro_batch_tokens[1] < 128


def test_memory_for_not_even_the_longest_row(tmp_path):
    rows = question_rows(RECORDED["gqa"])
    stage = build_stage(write_tiny_model("gqa", tmp_path), forgetful(10, []))
    with pytest.raises(DeviceError, match="out of memory with micro-batches of") as error:
        score_rows(stage, rows, 256)
    assert error.value.exit_code == 5


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_the_number_of_cores_changes_no_bit(tmp_path):
    """Launchers bind ranks to fewer cores than a process alone would have."""
    samples = {}
    for cores in ({min(os.sched_getaffinity(0))}, os.sched_getaffinity(0)):
        path = tmp_path / f"{len(cores)}.jsonl"
        run = f"import os; os.sched_setaffinity(0, {cores}); from cupyllama.cli import cli; cli()"
        command = [sys.executable, "-c", run, "score", "--demo", "--limit", "60", "--device", "cpu"]
        subprocess.run([*command, "--quiet", "--samples", path], check=True, capture_output=True)
        samples[len(cores)] = path.read_text()
    first, second = samples.values()
    assert first == second
