"""`cupyllama score`: read, tokenise, pack, load, evaluate, report."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cupyllama.checkpoint.llama import stage_bytes
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.config import ModelConfig, load_config
from cupyllama.errors import DeviceError, ModelError
from cupyllama.evaluate import ChoiceScores, evaluate, first_broken, plan
from cupyllama.loading import load_stage
from cupyllama.model.llama import Stage
from cupyllama.packing import MicroBatch
from cupyllama.parallel.devices import Device, choose_device, choose_dtype, gpu_dtype, storage_dtype
from cupyllama.provenance import digests, versions
from cupyllama.report import Answers, Report, check_writable, write_json, write_json_lines
from cupyllama.sizing import DEFAULT_TOKENS, activation_bytes, micro_batch_tokens
from cupyllama.tasks.conventions import CONVENTIONS, TokenRows, token_rows
from cupyllama.tasks.files import Task, first_questions, load_task
from cupyllama.tasks.question import Question
from cupyllama.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class ScoreOptions:
    """What the command line asks for."""

    model: Path
    tokenizer: Path | None = None
    data: Path | None = None
    task: str | None = None
    limit: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    micro_batch_tokens: int | None = None  # None: the default, or as many as fit
    convention: str = "lm-eval"
    bos: bool | None = None  # None: as the convention, else the tokenizer, has it
    output: Path | None = None
    samples: Path | None = None
    dry_run: bool = False
    quiet: bool = False


class Clock:
    """Seconds spent in each phase."""

    def __init__(self) -> None:
        self.seconds = {"loading": 0.0, "preparing": 0.0, "evaluating": 0.0}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - begin


@dataclass(frozen=True)
class Prepared:
    """Everything about the questions that the device need not know."""

    task: Task
    questions: list[Question]
    tokenizer: Tokenizer
    bos: bool
    rows: TokenRows


def score(options: ScoreOptions) -> Report | None:
    """Run the whole job; None after a dry run.

    Raises:
        CupyllamaError: whatever the user can mend, each with its exit code.
    """
    clock, began = Clock(), time.time()
    for path in (options.output, options.samples):
        if path is not None and not options.dry_run:
            check_writable(path)
    with clock.measure("preparing"):
        config = load_config(options.model)
        prepared = prepare(options, config)
    if options.dry_run:
        print(describe_plan(options, config, prepared))
        return None
    device, reason = choose_device(options.device)
    say = (lambda text: None) if options.quiet else (lambda text: print(text, file=sys.stderr))
    if reason and options.device == "auto":
        say(f"no GPU ({reason}); computing on the CPU")
    dtype = choose_dtype(options.dtype, config.dtype, device)
    checkpoint = SafetensorsCheckpoint(options.model)
    with clock.measure("loading"):
        stage = load_model(checkpoint, config, prepared.rows, device, dtype, options.quiet)
    with clock.measure("preparing"):
        longest = prepared.rows.longest
        size = micro_batch_tokens(options.micro_batch_tokens, longest, config, device, dtype)
        batches = plan(prepared.rows.rows, size, stage.ops)
    with clock.measure("evaluating"):
        scores = run(stage, prepared, batches, size, options.quiet, say)
    answers = check_answers(stage, prepared, scores)
    report = Report(
        task=prepared.task.name,
        metrics=answers.metrics(),
        headline=CONVENTIONS[options.convention].headline,
        questions=len(prepared.questions),
        questions_in_file=len(prepared.task.questions),
        tokens_asked=prepared.rows.tokens_asked,
        tokens_computed=scores.tokens_computed,
        truncated_rows=prepared.rows.truncated,
        seconds=clock.seconds,
        settings=settings(options, config, prepared, device, dtype, scores),
        digests=digests(checkpoint, config, prepared.tokenizer.path, prepared.task.digest),
        versions=versions(device),
        date=began,
    )
    if options.samples is not None:
        write_json_lines(options.samples, answers.samples())
    if options.output is not None:
        write_json(options.output, report.as_json())
    return report


def prepare(options: ScoreOptions, config: ModelConfig) -> Prepared:
    """Questions to token rows."""
    convention = CONVENTIONS[options.convention]
    tokenizer = load_tokenizer(options.model, options.tokenizer)
    check_vocabulary(tokenizer, config.vocab_size, options.model)
    task = load_task(options.data, options.convention, options.task)
    questions = first_questions(task.questions, options.limit)
    bos = options.bos if options.bos is not None else convention.bos
    bos = tokenizer.adds_bos if bos is None else bos
    rows = token_rows(questions, tokenizer, convention, bos, config.max_length)
    return Prepared(task, questions, tokenizer, bos, rows)


def load_model(
    checkpoint: SafetensorsCheckpoint,
    config: ModelConfig,
    rows: TokenRows,
    device: Device,
    dtype: str,
    quiet: bool,
) -> Stage:
    """All layers on one device.

    Raises:
        DeviceError: the weights do not fit.
    """
    from tqdm import tqdm

    layers = range(config.num_hidden_layers)
    need, free = stage_bytes(config, layers, storage_dtype(dtype)), device.free_bytes()
    too_large = DeviceError(
        f"the weights take {need / 1e9:.1f} GB in {dtype}, and {device.name} has "
        f"{(free or 0) / 1e9:.1f} GB free",
        "Free some memory, give a smaller --dtype, or take a larger device.",
    )
    if free is not None and need > free:
        raise too_large
    with tqdm(
        total=need, unit="B", unit_scale=True, desc="loading", disable=quiet or None, leave=False
    ) as bar:
        try:
            weights = load_stage(
                checkpoint, config, layers, storage_dtype(dtype), device.ops.to_device, bar.update
            )
        except MemoryError as error:
            raise too_large from error
    return Stage(config, weights, device.ops, rows.longest)


def run(
    stage: Stage,
    prepared: Prepared,
    batches: list[MicroBatch],
    size: int,
    quiet: bool,
    say,
) -> ChoiceScores:
    """Evaluate under a progress bar that counts the questions whose choices are all done."""
    from tqdm import tqdm

    choice_start = prepared.rows.choice_start
    question_of_choice = np.repeat(np.arange(len(choice_start) - 1), np.diff(choice_start))
    waiting = np.diff(choice_start)
    with tqdm(
        total=len(waiting), unit="question", desc="scoring", disable=quiet or None, smoothing=0.1
    ) as bar:

        def on_choices(choices: np.ndarray) -> None:
            np.subtract.at(waiting, question_of_choice[choices], 1)
            bar.update(int((waiting == 0).sum()) - bar.n)

        def on_halved(tokens: int) -> None:
            bar.clear()
            say(f"out of memory: going on with micro-batches of {tokens} tokens")

        return evaluate(stage, prepared.rows.rows, batches, size, on_choices, on_halved)


def check_answers(stage: Stage, prepared: Prepared, scores: ChoiceScores) -> Answers:
    """Refuse a log-likelihood that is not a number.

    Raises:
        ModelError: naming the first question and choice that has one.
    """
    rows, choice_start = prepared.rows.rows, prepared.rows.choice_start
    suspects = np.flatnonzero(~np.isfinite(scores.loglikelihoods))
    if len(suspects):
        choice = first_broken(stage, rows, suspects)
        choice = suspects[0] if choice is None else choice
        question = int(np.searchsorted(choice_start, choice, side="right")) - 1
        raise ModelError(
            f"question {question}, choice {choice - choice_start[question]}: the log-likelihood "
            f"is {scores.loglikelihoods[choice]}",
            "float16 may overflow: try --dtype bfloat16 or float32. If that does not help, the "
            "weights are broken.",
        )
    return Answers(
        prepared.questions,
        choice_start,
        scores.loglikelihoods,
        scores.is_greedy,
        prepared.rows.num_tokens,
    )


def settings(
    options: ScoreOptions,
    config: ModelConfig,
    prepared: Prepared,
    device: Device,
    dtype: str,
    scores: ChoiceScores,
) -> dict:
    """What another run must share to be comparable."""
    return {
        "model": str(options.model),
        "model_config": asdict(config),
        "tokenizer": str(prepared.tokenizer.path),
        "data": prepared.task.source,
        "limit": options.limit,
        "convention": options.convention,
        "bos": prepared.bos,
        "dtype": dtype,
        "device": device.name,
        "micro_batch_tokens": scores.micro_batch_tokens,
    }


def describe_plan(options: ScoreOptions, config: ModelConfig, prepared: Prepared) -> str:
    """What a run would do, as far as it can be told without touching a device."""
    from cupyllama.ops import reference

    rows = prepared.rows
    size = options.micro_batch_tokens or max(DEFAULT_TOKENS, rows.longest)
    batches = plan(rows.rows, size, reference)
    computed = sum(len(batch.token_ids) for batch in batches)
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if options.device == "cpu" else gpu_dtype(config.dtype)
    weights = stage_bytes(config, range(config.num_hidden_layers), storage_dtype(dtype))
    activations = activation_bytes(config, size, dtype, reference.LOGIT_CHUNK)
    return "\n".join(
        [
            f"{prepared.task.name}: {len(prepared.questions):,} questions, {len(rows.rows):,} rows "
            f"of up to {rows.longest:,} tokens, {rows.truncated:,} of them truncated",
            f"{rows.tokens_asked:,} tokens asked, {computed:,} computed "
            f"({rows.tokens_asked / max(computed, 1):.2f} times fewer), "
            f"{size * len(batches):,} with the padding that a GPU wants",
            f"{len(batches):,} micro-batches of {size:,} tokens",
            f"{config.num_hidden_layers} layers, {weights / 1e9:.2f} GB of weights in {dtype}, "
            f"{activations / 1e9:.2f} GB of activations",
        ]
    )
