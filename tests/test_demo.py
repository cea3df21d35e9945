"""The packaged demo: small, whole, held out, and right for a reason."""

import json

from click.testing import CliRunner

from cupyllama.cli import cli
from cupyllama.tasks.files import demo_directory

MEGABYTE = 1 << 20


def test_it_is_small():
    assert sum(path.stat().st_size for path in demo_directory().iterdir()) <= 4 * MEGABYTE


def test_its_accuracy_is_what_its_readme_says(tmp_path):
    output = tmp_path / "results.json"
    result = CliRunner().invoke(
        cli, ["score", "--demo", "--device", "cpu", "--quiet", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    scores = json.loads(output.read_text())["results"]["demo"]
    readme = (demo_directory() / "README.md").read_text().replace("\n", " ")
    assert f"accuracy of {scores['acc,none']:.4f} " in readme
    assert f"(`acc_norm`) of {scores['acc_norm,none']:.4f}" in readme
    assert scores["acc,none"] >= 0.8


def test_shuffled_answers_score_like_chance(tmp_path):
    """The accuracy comes from the endings, not from where the right one stands."""
    lines = (demo_directory() / "questions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        record["label"] = (record["label"] + 1 + number % 3) % 4
    path = tmp_path / "wrong.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--demo", "--data", str(path), "--device", "cpu", "--quiet", "--output"]
    result = CliRunner().invoke(cli, ["score", *arguments, str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "r.json").read_text())["results"]["demo"]["acc,none"] < 0.25


def test_labels_are_balanced_and_questions_differ():
    lines = (demo_directory() / "questions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len({(r["ctx"], r["endings"][r["label"]]) for r in records}) == len(records) == 400
    assert all(len(set(record["endings"])) == 4 for record in records)
    labels = [record["label"] for record in records]
    assert all(80 <= labels.count(label) <= 120 for label in range(4))
