"""Whole models on the GPU: against float32 on the CPU, and bit for bit against themselves."""

import json
import shutil
from pathlib import Path

import cupy
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from engine import build_stage, question_rows, score_rows
from safetensors.numpy import load_file, save_file
from test_evaluate import random_rows
from tiny_models import write_tiny_model

from cupyllama.cli import cli
from cupyllama.evaluate import ChoiceScores, Line, evaluate, plan
from cupyllama.ops import cuda
from cupyllama.packing import TokenRow
from cupyllama.tasks.files import demo_directory

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parents[1] / "data"
TRANSFORMERS = json.loads((DATA / "transformers_loglikelihoods.json").read_text())["models"]
LM_EVAL = json.loads((DATA / "lm_eval_hellaswag.json").read_text())


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_float32_equals_transformers(name, tmp_path):
    stage = build_stage(write_tiny_model(name, tmp_path), cuda, np.float32)
    questions = TRANSFORMERS[name]
    scores = score_rows(stage, question_rows(questions), 512)
    expected = np.concatenate([question["loglikelihoods"] for question in questions])
    np.testing.assert_allclose(scores.loglikelihoods, expected, rtol=0, atol=1e-4)
    greedy = np.concatenate([question["is_greedy"] for question in questions])
    np.testing.assert_array_equal(scores.is_greedy, greedy)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_half_precision_is_near_transformers(name, dtype, tmp_path):
    stage = build_stage(write_tiny_model(name, tmp_path), cuda, dtype)
    questions = TRANSFORMERS[name]
    scores = score_rows(stage, question_rows(questions), 512)
    expected = np.concatenate([question["loglikelihoods"] for question in questions])
    tokens = np.concatenate([[len(e) for e in question["endings"]] for question in questions])
    bound = 0.03 if dtype == np.float16 else 0.25  # nats a token: 2^-11 and 2^-8 of the logits
    assert (np.abs(scores.loglikelihoods - expected) / np.sqrt(tokens)).max() < bound


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def tiny(request, tmp_path_factory):
    dtype = ml_dtypes.bfloat16 if request.param == "bfloat16" else np.dtype(request.param)
    model = write_tiny_model("gqa", tmp_path_factory.mktemp("gqa"))
    return build_stage(model, cuda, dtype)


def fresh_rows(questions: int) -> list[TokenRow]:
    rng = np.random.default_rng()
    print("seed", rng.bit_generator.seed_seq.entropy)
    return random_rows(rng, questions)


def renumbered(rows) -> list[TokenRow]:
    return [TokenRow(row.token_ids, row.first_target, i) for i, row in enumerate(rows)]


@pytest.mark.parametrize("micro_batch_tokens", [128, 512, 1024])
def test_scores_do_not_depend_on_company(tiny, micro_batch_tokens):
    """Order, limit, being alone, the size of micro-batches: the same bits."""
    rows = fresh_rows(60)
    everything = score_rows(tiny, rows, micro_batch_tokens).loglikelihoods
    np.testing.assert_array_equal(score_rows(tiny, rows, 300).loglikelihoods, everything)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = score_rows(tiny, renumbered(rows[i] for i in order), micro_batch_tokens)
    np.testing.assert_array_equal(shuffled.loglikelihoods, everything[order])
    for limit in (1, 7, 50):
        few = score_rows(tiny, rows[:limit], micro_batch_tokens).loglikelihoods
        np.testing.assert_array_equal(few, everything[:limit])
    for choice in (3, len(rows) // 2, len(rows) - 1):
        alone = score_rows(tiny, renumbered([rows[choice]]), micro_batch_tokens)
        assert alone.loglikelihoods[0] == everything[choice]


def test_rows_shorter_than_the_padding(tmp_path):
    """Padding has positions up to 63, whatever the longest row is."""
    model = write_tiny_model("gqa", tmp_path)
    rows = [TokenRow([1, 5, 9, 7 + i], 3, i) for i in range(5)]
    short = score_rows(build_stage(model, cuda, np.float16, positions=3), rows, 256)
    long = score_rows(build_stage(model, cuda, np.float16, positions=512), rows, 256)
    np.testing.assert_array_equal(short.loglikelihoods, long.loglikelihoods)


def test_a_second_run_gives_the_same_bits(tiny):
    rows = fresh_rows(40)
    first = score_rows(tiny, rows, 512)
    second = score_rows(tiny, rows, 512)
    np.testing.assert_array_equal(first.loglikelihoods, second.loglikelihoods)
    np.testing.assert_array_equal(first.is_greedy, second.is_greedy)


def test_out_of_memory_halves_and_goes_on(tmp_path):
    """A real limit on the pool, at two thirds of what a single micro-batch takes."""
    stage = build_stage(write_tiny_model("llama_tokenizer", tmp_path), cuda, np.float16)
    rows, pool = random_rows(np.random.default_rng(), 300), cupy.get_default_memory_pool()
    size, halved = 1 << 16, []
    pool.free_all_blocks()
    before = pool.total_bytes()
    expected = score_rows(stage, rows, size).loglikelihoods
    limit = before + 2 * (pool.total_bytes() - before) // 3
    pool.free_all_blocks()
    pool.set_limit(size=limit)
    try:
        scores = ChoiceScores.empty(len(rows), size)
        evaluate(Line(stage), rows, plan(rows, size, cuda), scores, on_halved=halved.append)
    finally:
        pool.set_limit(size=0)
    assert halved and scores.micro_batch_tokens == [size, *halved]
    np.testing.assert_array_equal(scores.loglikelihoods, expected)


def test_memory_limit_for_nothing_at_all(tmp_path):
    from cupyllama.errors import DeviceError

    stage = build_stage(write_tiny_model("llama_tokenizer", tmp_path), cuda, np.float16)
    rows = fresh_rows(3)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.total_bytes() + 4096)
    try:
        with pytest.raises(DeviceError, match="out of memory"):
            score_rows(stage, rows, 256)
    finally:
        pool.set_limit(size=0)


def run_score(*arguments) -> None:
    result = CliRunner().invoke(cli, ["score", "--quiet", *map(str, arguments)])
    assert result.exit_code == 0, result.output


def read_samples(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_real_questions_in_float16(real_data, tmp_path):
    """200 questions of HellaSwag: near float32, and no clear prediction flipped."""
    import bz2

    model = write_tiny_model("llama_tokenizer", tmp_path / "model", dtype="float16")
    # Logits of standard deviation 0.5. What float16 rounds off grows with them: at the 2.0 that
    # the model has otherwise it is 0.04 nats of the 400 that a row comes to.
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= np.float16(0.25)
    save_file(tensors, model / "model.safetensors")
    shutil.copy(real_data / "llama_tokenizer.model", model / "tokenizer.model")
    lines = bz2.decompress((real_data / "hellaswag_val_full.txt.bz2").read_bytes()).split(b"\n")
    chosen = [b"\n".join(lines[6 * i : 6 * i + 6]) for i in LM_EVAL["indexes"]]
    questions = tmp_path / "questions.txt"
    questions.write_bytes(b"\n".join(chosen) + b"\n")
    samples = {}
    for device, dtype in [("cpu", "float32"), ("cuda", "float16"), ("cuda", "float32")]:
        path = tmp_path / f"{device}-{dtype}.jsonl"
        fixed = ["--model", model, "--data", questions, "--samples", path]
        run_score(*fixed, "--device", device, "--dtype", dtype)
        samples[device, dtype] = read_samples(path)
    exact = samples["cpu", "float32"]
    for dtype, bound in (("float32", 1e-3), ("float16", 2e-2)):
        found = samples["cuda", dtype]
        difference = [
            np.abs(np.subtract(a["loglikelihoods"], b["loglikelihoods"])).max()
            for a, b in zip(exact, found, strict=True)
        ]
        print(dtype, "largest difference", max(difference))
        assert max(difference) < bound
        for a, b in zip(exact, found, strict=True):
            best, second = sorted(a["loglikelihoods"])[:-3:-1]
            assert a["pred"] == b["pred"] or best - second <= 0.05


def test_the_demo_scores_alike_on_both(tmp_path):
    results = {}
    for device in ("cpu", "cuda"):
        run_score("--demo", "--device", device, "--samples", tmp_path / device)
        results[device] = read_samples(tmp_path / device)
    assert (demo_directory() / "questions.jsonl").is_file()
    for a, b in zip(results["cpu"], results["cuda"], strict=True):
        np.testing.assert_allclose(a["loglikelihoods"], b["loglikelihoods"], rtol=0, atol=0.1)
    right = {
        device: np.mean([sample["pred"] == sample["gold"] for sample in samples])
        for device, samples in results.items()
    }
    assert abs(right["cpu"] - right["cuda"]) <= 0.01 and right["cuda"] > 0.8
