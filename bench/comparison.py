"""What comparisons with other engines have in common: options, the job, the table, the JSON."""

import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from engines import Child, Job, Turn, take_turns
from hf_folder import SHAPES, write_folder, write_tokenizer
from one_line import one_line

from cupyllama.config import load_config
from cupyllama.parallel.devices import choose_device
from cupyllama.report import Answers
from cupyllama.sizing import DEFAULT_TOKENS
from cupyllama.tasks.conventions import CONVENTIONS, token_rows
from cupyllama.tasks.files import load_task
from cupyllama.tasks.question import Question
from cupyllama.tokenizer import load_tokenizer

_PATH = click.Path(path_type=Path)
OPTIONS = [
    click.option("--shape", type=click.Choice(list(SHAPES)), default="llama-7b"),
    click.option("--folder", type=_PATH, help="Where --shape is written, once: 13.5 GB for 7B."),
    click.option("--model", type=_PATH, help="A real checkpoint's directory instead of --shape."),
    click.option("--tokenizer", type=_PATH, help="tokenizer.model, or that of --model."),
    click.option("--data", type=_PATH, required=True),
    click.option("--questions", type=click.IntRange(min=1), default=1000),
    click.option("--dtype", default="float16"),
    click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda"),
    click.option("--micro-batch-tokens", default=DEFAULT_TOKENS, help="Ours."),
    click.option("--repeats", type=click.IntRange(min=1), default=3),
    click.option("--json", "json_path", type=_PATH),
]


def comparison_options(command: Callable) -> Callable:
    """The options that all comparisons have."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def require(module: str, requirement: str) -> None:
    """End with one line unless `module` is there, which `requirement` installs."""
    if importlib.util.find_spec(module) is None:
        raise click.ClickException(f"{module} is not installed: pip install '{requirement}'")


def spread(questions: Sequence[Question], count: int) -> list[Question]:
    """As many questions as there are, up to `count`, evenly over the set."""
    count = min(count, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


@contextmanager
def prepared(
    shape: str,
    folder: Path | None,
    model: Path | None,
    tokenizer: Path | None,
    data: Path,
    questions: int,
    dtype: str,
    device: str,
) -> Iterator[Job]:
    """The job of a command line; errors of ours within it end the command with one line."""
    with one_line():
        choose_device(device)  # before 13.5 GB are written
        with TemporaryDirectory() as scratch:
            if model is None:
                if folder is None or tokenizer is None:
                    raise click.UsageError("--shape needs --folder and --tokenizer; else --model")
                write_folder(folder, shape)
                model = hf_tokenizer = folder
            else:
                shape, hf_tokenizer = model.resolve().name, Path(scratch)
            tokens = load_tokenizer(model, tokenizer)
            if tokens.path.suffix == ".json":
                hf_tokenizer = tokens.path.parent
            else:
                write_tokenizer(hf_tokenizer, tokens.path)
            asked, bos = spread(load_task(data, "lm-eval").questions, questions), tokens.adds_bos
            length = load_config(model).max_length
            rows = token_rows(asked, tokens, CONVENTIONS["lm-eval"], bos, length)
            yield Job(shape, model, tokens.path, hf_tokenizer, asked, rows, bos, dtype, device)


def compare(
    bench: str, job: Job, engines: Sequence[tuple], repeats: int, json_path: Path | None
) -> None:
    """Measure `engines`, of which the first is ours; print the table and write the JSON."""
    children, turns = take_turns(engines, repeats)
    runs = summary(job, children, turns)
    print("\n".join(table(runs, len(job.questions))), flush=True)
    if json_path is not None:
        result = {
            "bench": bench,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": children[0].info["gpu"],
            "versions": {k: v for child in children for k, v in child.versions.items()},
            "shape": job.shape,
            "questions": len(job.questions),
            "tokens_asked": job.rows.tokens_asked,
            "runs": runs,
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n")


def summary(
    job: Job, children: Sequence[Child], turns: Sequence[Sequence[Turn]]
) -> list[dict[str, Any]]:
    """A record an engine: medians, and how each compares with the first."""
    runs: list[dict[str, Any]] = []
    for child, mine in zip(children, turns, strict=True):
        rate = len(job.questions) / statistics.median(turn.seconds for turn in mine)
        run = {
            "engine": child.name,
            "dtype": child.dtype,
            **{key: value for key, value in child.info.items() if key != "gpu"},
            "seconds": [turn.seconds for turn in mine],
            "tokenising_seconds": [turn.tokenising_seconds for turn in mine],
            "questions_per_second": rate,
            "times_ours": rate / runs[0]["questions_per_second"] if runs else 1.0,
        }
        if runs:
            run |= agreement(job, turns[0][-1].loglikelihoods, mine[-1].loglikelihoods)
        runs.append(run)
    return runs


def agreement(job: Job, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """How far log-likelihoods (choices,) are apart, and how many questions are answered alike."""
    away, flags = np.abs(ours - theirs), np.zeros(len(ours), bool)
    one, other = (
        Answers(job.questions, job.rows.choice_start, sums, flags, job.rows.num_tokens).picks
        for sums in (ours, theirs)
    )
    return {
        "largest_difference": float(away.max()),
        "mean_difference": float(away.mean()),
        "same_predictions": {
            name: int((one[name] == other[name]).sum()) for name in ("acc", "acc_norm")
        },
    }


def table(runs: Sequence[dict[str, Any]], questions: int) -> list[str]:
    """The lines that a person reads."""
    lines = [f"{'engine':<12} | {'dtype':<8} | questions/s | × ours"]
    for run in runs:
        lines.append(
            f"{run['engine']:<12} | {run['dtype']:<8} | {run['questions_per_second']:11.1f} | "
            f"{run['times_ours']:6.3f}"
        )
    for run in runs[1:]:
        same = run["same_predictions"]
        lines.append(
            f"{run['engine']}: log-likelihoods differ from ours by {run['mean_difference']:.2g}, "
            f"at most {run['largest_difference']:.2g}; predictions are ours on {same['acc']} (acc) "
            f"and {same['acc_norm']} (acc_norm) of {questions} questions"
        )
        if run.get("rows_tokenised_otherwise"):
            lines.append(
                f"{run['engine']}: tokenised {run['rows_tokenised_otherwise']} rows otherwise"
            )
    return lines
