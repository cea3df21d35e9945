"""Engines that take turns: each in a process of its own, and never two at work at a time.

A process loads, runs once to warm up, and then waits to be told to go. Runs of one engine alternate
with runs of the other, so that the card is as warm for both.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np

from cupyllama.background import BackgroundLoad
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.config import load_config
from cupyllama.errors import CupyllamaError
from cupyllama.evaluate import ChoiceScores, Line, evaluate, plan
from cupyllama.families import family_of
from cupyllama.parallel.devices import choose_device
from cupyllama.provenance import versions
from cupyllama.tasks.conventions import CONVENTIONS, TokenRows, token_rows
from cupyllama.tasks.question import Question
from cupyllama.tokenizer import load_tokenizer

STOP_SECONDS = 30  # that an engine has to end by itself


@dataclass(frozen=True)
class Job:
    """What every engine of a comparison is given."""

    shape: str  # or the name of a real checkpoint
    model: Path
    tokenizer: Path  # what cupyllama reads
    hf_tokenizer: Path  # a directory that transformers reads to the same ids
    questions: Sequence[Question]
    rows: TokenRows
    bos: bool
    dtype: str
    device: str


@dataclass(frozen=True)
class Turn:
    """One run over all questions."""

    seconds: float
    tokenising_seconds: float  # of them; 0 where the engine is given token ids
    loglikelihoods: np.ndarray  # (choices,) float64


class Engine(Protocol):
    """A loaded model."""

    name: str
    dtype: str  # for the table
    info: dict[str, Any]  # for the JSON
    versions: dict[str, str]

    def run(self) -> Turn:
        """Score all questions."""
        ...


class Ours:
    """cupyllama, from the questions' text or from token rows to log-likelihoods."""

    name = "cupyllama"

    def __init__(self, job: Job, micro_batch_tokens: int, from_text: bool):
        device, _ = choose_device(job.device)
        self.job, self.size, self.from_text = job, micro_batch_tokens, from_text
        self.config, self.ops = load_config(job.model), device.ops
        layers = range(self.config.num_hidden_layers)
        checkpoint = open_checkpoint(job.model)
        load = BackgroundLoad(checkpoint, self.config, layers, job.dtype, device, False)
        stage = family_of(self.config).model.Stage
        self.line = Line(stage(self.config, load.wait(), device.ops, job.rows.longest))
        self.tokenizer = load_tokenizer(job.tokenizer.parent, job.tokenizer)
        self.dtype, self.versions = job.dtype, versions(device)
        self.info = {"gpu": device.name, "micro_batch_tokens": micro_batch_tokens}

    def run(self) -> Turn:
        begin, job, rows = time.perf_counter(), self.job, self.job.rows
        if self.from_text:
            convention, length = CONVENTIONS["lm-eval"], self.config.max_length
            rows = token_rows(job.questions, self.tokenizer, convention, job.bos, length)
        tokenised = time.perf_counter()
        scores = ChoiceScores.empty(len(rows.rows), self.size)
        evaluate(self.line, rows.rows, plan(rows.rows, self.size, self.ops), scores)
        seconds = time.perf_counter() - begin
        assert len(scores.micro_batch_tokens) == 1, f"halved to {scores.micro_batch_tokens}"
        return Turn(seconds, tokenised - begin if self.from_text else 0.0, scores.loglikelihoods)


class Child:
    """An engine in a process of its own, which works only between `go` and its answer."""

    def __init__(self, make: Callable[..., Engine], *arguments: Any):
        # spawn: a fork would share CUDA's state. No daemon: vLLM has processes of its own.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.name = make.name

    def wait(self) -> None:
        """Until it has loaded and warmed up."""
        self.dtype, self.info, self.versions = self._answer()

    def go(self) -> Turn:
        """Have it run once, and wait.

        Raises:
            click.ClickException: it failed, with its own words.
        """
        return self._answer("go")

    def close(self) -> None:
        """End it, whatever it does."""
        self.pipe.close()  # the end, to one that waits
        for end in (lambda: None, self.process.terminate, self.process.kill):
            end()
            self.process.join(STOP_SECONDS)
            if self.process.exitcode is not None:
                return

    def _answer(self, word: str | None = None) -> Any:
        try:
            if word is not None:
                self.pipe.send(word)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(STOP_SECONDS)
            code = self.process.exitcode
            raise click.ClickException(f"{self.name} ended with exit code {code}") from error
        if isinstance(answer, str):
            raise click.ClickException(f"{self.name}: {answer}")
        return answer


def _serve(pipe: Any, make: Callable[..., Engine], arguments: tuple) -> None:
    """What the process of an engine runs."""
    os.dup2(2, 1)  # what engines say goes to stderr: stdout is for the result
    try:
        engine = make(*arguments)
        engine.run()
        pipe.send((engine.dtype, engine.info, engine.versions))
        while _is_wanted(pipe):
            pipe.send(engine.run())
    except CupyllamaError as error:
        pipe.send(f"{error} {error.hint}".strip())
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}".split("\n")[0])


def _is_wanted(pipe: Any) -> bool:
    """Waits for the word to go, or for the end."""
    try:
        return pipe.recv() == "go"
    except EOFError:
        return False


def take_turns(engines: Sequence[tuple], repeats: int) -> tuple[list[Child], list[list[Turn]]]:
    """Load one engine after the other, then let each run in turn, `repeats` times.

    Args:
        engines: what makes each, and its arguments.
    """
    with ExitStack() as stack:
        children = []
        for engine in engines:  # not all at once: vLLM refuses memory that changes as it loads
            child = Child(*engine)
            stack.callback(child.close)
            child.wait()
            children.append(child)
        turns: list[list[Turn]] = [[] for _ in children]
        for _ in range(repeats):
            for child, mine in zip(children, turns, strict=True):
                mine.append(child.go())
    return children, turns
