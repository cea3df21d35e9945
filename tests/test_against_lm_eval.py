"""The demo and the real benchmark as lm-eval's `hf` backend scored them, recorded."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_models import write_tiny_model

from cupyllama.cli import cli
from cupyllama.config import load_config
from cupyllama.questions import read_questions
from cupyllama.score import ScoreOptions
from cupyllama.tasks.files import demo_directory

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "lm_eval_hellaswag.json").read_text())
DEMO = json.loads((DATA / "lm_eval_demo.json").read_text())
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "acc_bytes")


@pytest.fixture(scope="module")
def questions(real_data, tmp_path_factory) -> Path:
    """The questions that lm-eval was given, in the six-line form."""
    import bz2

    lines = bz2.decompress((real_data / "hellaswag_val_full.txt.bz2").read_bytes()).split(b"\n")
    chosen = [b"\n".join(lines[6 * i : 6 * i + 6]) for i in RECORDED["indexes"]]
    path = tmp_path_factory.mktemp("questions") / "questions.txt"
    path.write_bytes(b"\n".join(chosen) + b"\n")
    return path


@pytest.fixture(scope="module")
def model(real_data, tmp_path_factory) -> Path:
    directory = write_tiny_model("llama_tokenizer", tmp_path_factory.mktemp("model"))
    shutil.copy(real_data / "llama_tokenizer.model", directory / "tokenizer.model")
    return directory


@pytest.mark.parametrize(
    ("recorded", "bos", "max_length"),
    [
        (RECORDED, "yes", 256),
        (RECORDED["without_bos"], "no", 256),
        (RECORDED["truncated"], "yes", 80),
    ],
    ids=["bos", "without_bos", "truncated"],
)
def test_real_questions_score_as_in_lm_eval(recorded, bos, max_length, questions, model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": max_length})
    )
    report = check_scores(recorded, tmp_path / "model", questions, bos, tmp_path)
    assert report["cupyllama"]["truncated_rows"] == recorded["settings"]["truncated_rows"]


@pytest.mark.parametrize(
    ("recorded", "bos"), [(DEMO, "auto"), (DEMO["without_bos"], "no")], ids=["bos", "without_bos"]
)
def test_the_demo_scores_as_in_lm_eval(recorded, bos, tmp_path):
    lines = (demo_directory() / "questions.jsonl").read_text().splitlines(keepends=True)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(lines[index] for index in DEMO["indexes"]))
    check_scores(recorded, demo_directory(), questions, bos, tmp_path)
    assert recorded["results"]["acc"] > 0.8


def check_scores(recorded: dict, model: Path, questions: Path, bos: str, folder: Path) -> dict:
    """Score on the CPU, compare all that lm-eval reports, and return the results file."""
    samples, output = folder / "samples.jsonl", folder / "results.json"
    arguments = ["--model", model, "--data", questions, "--bos", bos, "--device", "cpu"]
    arguments += ["--samples", samples, "--output", output, "--quiet"]
    result = CliRunner().invoke(cli, ["score", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    ours = [json.loads(line) for line in samples.read_text().splitlines()]
    theirs = recorded["questions"]
    for field in ("gold", "is_greedy"):
        assert [sample[field] for sample in ours] == [question[field] for question in theirs]
    np.testing.assert_allclose(
        [sample["loglikelihoods"] for sample in ours],
        [question["loglikelihoods"] for question in theirs],
        rtol=0,
        atol=1e-3,
    )
    report = json.loads(output.read_text())
    for metric in METRICS:
        expected = pytest.approx(recorded["results"][metric], rel=1e-12)
        assert report["results"]["hellaswag"][f"{metric},none"] == expected
    return report


def test_real_questions_have_the_same_token_rows(questions, model):
    options = ScoreOptions(model=model, data=questions, bos=True)
    rows = read_questions(options, load_config(model)).rows
    ours = [zlib.crc32(np.array(row.token_ids, "<i4").tobytes()) for row in rows.rows]
    theirs = [crc for question in RECORDED["questions"] for crc in question["row_crc32"]]
    assert ours == theirs
    endings = [n for question in RECORDED["questions"] for n in question["ending_tokens"]]
    assert rows.num_tokens.tolist() == endings
