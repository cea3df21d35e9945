"""`cupyllama score`: read, tokenise, pack, load, evaluate, report."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.compare import OtherRun, check_questions, compare, read_samples
from cupyllama.errors import DeviceError, NotFiniteError, OutputError
from cupyllama.evaluate import ChoiceScores, evaluate, first_broken, plan
from cupyllama.families import config_fields, family_of
from cupyllama.files import check_apart, check_writable, is_special, write_json, write_json_lines
from cupyllama.journal import Journal
from cupyllama.parallel import pipeline
from cupyllama.parallel.devices import storage_dtype
from cupyllama.parallel.world import World, open_world
from cupyllama.plan import describe_plan
from cupyllama.printing import note, print_now
from cupyllama.progress import ProgressBar
from cupyllama.provenance import digests, versions
from cupyllama.questions import read_questions
from cupyllama.rank import Rank, check_same
from cupyllama.report import Answers, RankReport, Report
from cupyllama.sizing import default_tokens, micro_batch_tokens
from cupyllama.tasks.conventions import CONVENTIONS
from cupyllama.trace import Span, busy_seconds, write_trace


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
    quantize: str = "auto"  # the matrices of the layers: none, fp8, int8; auto: as stored
    micro_batch_tokens: int | None = None  # None: the default, or as many as fit
    convention: str = "lm-eval"
    bos: bool | None = None  # None: as the convention, else the tokenizer, has it
    replicas: int = 1
    tensor_parallel: int = 1  # ranks that share the matrices of a stage
    layers_per_stage: tuple[int, ...] | None = None  # None: so that the slowest is fastest
    output: Path | None = None
    samples: Path | None = None
    resume: bool = False
    compare: Path | None = None  # samples of another run
    trace: Path | None = None
    dry_run: bool = False
    quiet: bool = False


def score(options: ScoreOptions) -> Report | None:
    """Run the whole job, together with the other ranks if a launcher started several.

    Returns:
        The report on rank 0; None elsewhere, and after a dry run.

    Raises:
        CupyllamaError: whatever the user can mend, each with its exit code.
    """
    world = open_world("With --samples, --resume goes on from there.")
    run = Run(options, world)
    try:
        with world.together():
            run.set_up()
        with world.together():
            run.read_questions()
        if options.dry_run:
            report = run.describe()
        else:
            run.agree()
            with world.together():
                run.pack_and_load()
            with world.alone():
                run.connect()
                report = run.evaluate()
    except KeyboardInterrupt:
        if run.journal is not None and run.journal.path.exists():
            note(f"{run.journal.path} has the answers so far: --resume goes on from there")
        raise
    finally:
        run.close()
    world.close()
    return report


class Run(Rank):
    """One rank's part of a run, step by step."""

    def __init__(self, options: ScoreOptions, world: World):
        super().__init__(options, world)
        self.began = time.time()
        self.spans: list[Span] = []
        self.journal: Journal | None = None
        self.other: OtherRun | None = None

    def set_up(self) -> None:
        """Who does what on which device; begins to load."""
        options, world = self.options, self.world
        self.choose_part(options.replicas)
        if options.compare is not None and world.rank == 0:
            self.other = read_samples(options.compare)
        if options.dry_run:
            return
        if world.rank == 0:
            self.check_outputs()
        self.begin_load()

    def check_outputs(self) -> None:
        """Refuse before the run what could lose its results, or an earlier one's."""
        options = self.options
        read = {"--data": options.data, "--tokenizer": options.tokenizer}
        read["--compare"] = options.compare
        written = {"--output": options.output, "--samples": options.samples}
        written["--trace"] = options.trace
        if options.samples is not None and not is_special(options.samples):
            self.journal = Journal(options.samples)
            if options.resume:
                self.journal.check_unfinished()
        journal = None if self.journal is None else self.journal.path
        check_apart(read, written | {"the answers of --samples so far": journal})
        for path in filter(None, written.values()):
            check_writable(path)
        if self.journal is not None:
            self.journal.claim(options.resume)

    def read_questions(self) -> None:
        """Questions to token rows, while weights are loading."""
        begin = time.time()
        self.questions = read_questions(self.options, self.config)
        self.spans.append(Span("tokenise", None, begin, time.time()))
        if self.other is not None:
            questions = self.questions
            check_questions(self.other, questions.task.questions, len(questions.asked))
        if self.options.dry_run:
            return
        tokenizer, task = self.questions.tokenizer, self.questions.task
        self.digests = digests(self.checkpoint, self.config, tokenizer.path, task.digest)
        self.old = self.journal.settings() if self.journal and self.options.resume else None

    def agree(self) -> None:
        """All ranks have the same work before them; settles the micro-batch size."""
        rows = self.questions.rows
        work = {
            "model": self.digests["model"],
            "token rows": rows.digest(),
            "dtype": self.dtype,
            "quantize": self.quantize,
            "tensor parallelism": self.grid.tensor_parallel,
            "kind of device": self.device.kind,
        }
        places = self.world.allgather(self.device.place)
        asked = self.options.micro_batch_tokens or (self.old or {}).get("micro_batch_tokens")
        free = self.load.free_for_activations(sharing=places.count(self.device.place))
        size = micro_batch_tokens(
            asked,
            rows.longest,
            self.own_config,
            self.dtype,
            self.device.ops.LOGIT_CHUNK,
            free,
            self.quantize,
            fused=self.device.compute_capability == 90 and self.dtype != "float32",
            default=default_tokens(self.device.kind, self.world.size),
        )
        everyone = self.world.allgather((work, size, asked))
        with self.world.together():
            check_same([other for other, _, _ in everyone])
        self.size = everyone[0][2] or min(size for _, size, _ in everyone)

    def pack_and_load(self) -> None:
        """Micro-batches, what an earlier run knew of them, and the stage itself."""
        begin = time.time()
        rows = self.questions.rows.rows
        self.batches = plan(rows, self.size, self.device.ops)
        self.spans.append(Span("tokenise", None, begin, time.time()))
        self.scores = ChoiceScores.empty(len(rows), self.size)
        if self.old is not None:
            count = self.journal.resume(self.fingerprint(), self.scores)
            self.say(f"resuming: {count:,} of {len(rows):,} choices are scored already")
        elif self.journal is not None:
            if self.options.resume:
                self.say(f"{self.journal.path} has no answers: scoring everything")
            self.journal.begin(self.fingerprint())
        if self.journal is not None and self.world.size > 1:
            # Open MPI 5 lets nobody say it after Ctrl-C: its launcher reads no stderr any more.
            self.say(f"answers are kept in {self.journal.path}: --resume goes on after a break")
        self.to_score = ~self.scores.done
        self.weights = self.load.wait()
        self.spans.append(Span("load", None, self.load.began, self.load.ended))

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for answers to go together."""
        return self.digests | {
            "questions": len(self.questions.asked),
            "convention": self.options.convention,
            "bos": self.questions.bos,
            "dtype": self.dtype,
            "quantize": self.quantize or "none",
            "tensor_parallel": self.grid.tensor_parallel,
            "device": self.device.name if self.device.kind == "cuda" else "cpu",
            "micro_batch_tokens": self.size,
        }

    def connect(self) -> None:
        """Leave out what is known, open the channels to the neighbours, and make the stage."""
        self.scores.done = self.world.allgather(self.scores.done)[0]
        self.batches = self.scores.missing(self.batches)
        config, ops, longest = self.own_config, self.device.ops, self.questions.rows.longest
        try:
            group = pipeline.connect_group(self.world, self.grid, self.device, config)
            stage = family_of(config).model.Stage(config, self.weights, ops, longest, group)
            self.line = pipeline.connect(
                self.world,
                self.grid,
                stage,
                self.device,
                self.batches,
                self.config,
                storage_dtype(self.dtype),
            )
        except MemoryError as error:
            raise DeviceError(
                f"no memory for what ranks pass on with micro-batches of {self.size} tokens",
                "Give a smaller --micro-batch-tokens.",
            ) from error

    def evaluate(self) -> Report | None:
        """Score what is missing; on rank 0, write and return the report."""
        rows = self.questions.rows
        self.world.allgather(None)  # all are ready: the clock runs
        begin = time.time()
        with ProgressBar(rows.choice_start, self.scores.done, self.is_printer) as bar:

            def on_choices(choices: np.ndarray) -> None:
                if self.journal is not None:
                    self.journal.append(self.scores, choices)
                bar.advance(choices)

            def on_halved(tokens: int) -> None:
                self.say(f"out of memory: going on with micro-batches of {tokens} tokens")

            if self.world.size == 1:
                evaluate(self.line, rows.rows, self.batches, self.scores, on_choices, on_halved)
            else:
                pipeline.run(
                    self.world,
                    self.grid,
                    self.line,
                    self.batches,
                    lambda batch, out: on_choices(self.scores.add(batch, out)),
                )
        self.world.allgather(None)
        seconds = time.time() - begin
        ranks = self.world.allgather(self.rank_report(seconds))
        if self.world.rank != 0:
            return None
        return self.finish(seconds, ranks)

    def rank_report(self, seconds: float) -> RankReport:
        """This rank's part, for rank 0."""
        spans = self.spans + self.line.spans
        return RankReport(
            rank=self.world.rank,
            replica=self.grid.replica,
            tensor_rank=self.grid.tensor_rank,
            tensor_parallel=self.grid.tensor_parallel,
            layers=(self.layers.start, self.layers.stop),
            device=self.device.name,
            bytes_read=self.own_checkpoint.bytes_read,
            micro_batches=len(self.grid.share(self.batches)),
            busy=busy_seconds(spans) / max(seconds, 1e-9),
            place=self.device.place,
            link_seconds=self.line.link_seconds,
            spans=spans,
        )

    def finish(self, seconds: float, ranks: list[RankReport]) -> Report:
        """Answers to files, and the report."""
        options, questions, rows = self.options, self.questions, self.questions.rows
        answers = self.check_answers()
        report = Report(
            task=questions.task.name,
            metrics=answers.metrics(),
            headline=CONVENTIONS[options.convention].headline,
            questions=len(questions.asked),
            questions_in_file=len(questions.task.questions),
            questions_scored=sum(
                bool(self.to_score[first:last].any()) for first, last in pairwise(rows.choice_start)
            ),
            tokens_asked=sum(
                len(row.token_ids) - 1
                for row, asked in zip(rows.rows, self.to_score, strict=True)
                if asked
            ),
            tokens_computed=self.scores.tokens_computed,
            truncated_rows=questions.rows.truncated,
            seconds={
                "loading": sum(s.end - s.begin for s in self.spans if s.name == "load"),
                "preparing": sum(s.end - s.begin for s in self.spans if s.name == "tokenise"),
                "evaluating": seconds,
            },
            total_seconds=time.time() - self.began,
            settings=self.settings(),
            digests=self.digests,
            versions=versions(self.device),
            date=self.began,
            ranks=ranks,
            comparison=compare(self.other, answers) if self.other is not None else None,
        )
        self.write(report, answers)
        return report

    def write(self, report: Report, answers: Answers) -> None:
        """All files that are asked for, and the table; the journal is there until all of them are.

        What one of them says does not keep the others from being written.

        Raises:
            OutputError: the first that cannot be written.
            BrokenPipeError: nobody reads it.
        """
        options, ranks = self.options, [(rank.title, rank.spans) for rank in report.ranks]
        writes: list[Callable[[], None]] = []
        if options.samples is not None:
            writes.append(lambda: write_json_lines(options.samples, answers.samples()))
        if options.output is not None:
            writes.append(lambda: write_json(options.output, report.as_json()))
        if options.trace is not None:
            writes.append(lambda: write_trace(options.trace, ranks))
        writes.append(lambda: print_now(report.as_text() + "\n"))
        failed: list[OutputError | BrokenPipeError] = []
        for write in writes:
            try:
                write()
            except (OutputError, BrokenPipeError) as error:
                failed.append(error)
        unwritten = next((error for error in failed if isinstance(error, OutputError)), None)
        if self.journal is not None and unwritten is not None:
            safe = f"All answers are safe in {self.journal.path}: with --resume they are written."
            raise OutputError(str(unwritten), f"{unwritten.hint} {safe}") from unwritten
        if self.journal is not None:
            self.journal.remove()
        if failed:
            raise failed[0]

    def check_answers(self) -> Answers:
        """Refuse a log-likelihood that is not a number.

        Raises:
            NotFiniteError: naming the first question and choice that has one.
        """
        questions, scores = self.questions, self.scores
        choice_start = questions.rows.choice_start
        suspects = np.flatnonzero(~np.isfinite(scores.loglikelihoods))
        if len(suspects):
            choice = suspects[0]
            if self.world.size == 1:  # the whole model is here: find out which it was
                found = first_broken(self.line.stage, questions.rows.rows, suspects)
                choice = choice if found is None else found
            if self.journal is not None:
                self.journal.remove()
            question = int(np.searchsorted(choice_start, choice, side="right")) - 1
            place = questions.asked[question].place
            raise NotFiniteError(
                f"question {question} ({place}), choice {choice - choice_start[question]}: the "
                f"log-likelihood is {scores.loglikelihoods[choice]}"
            )
        return Answers(
            questions.asked,
            choice_start,
            scores.loglikelihoods,
            scores.is_greedy,
            questions.rows.num_tokens,
        )

    def settings(self) -> dict[str, Any]:
        """What another run must share to be comparable."""
        return {
            "model": str(self.options.model),
            "model_config": config_fields(self.config),
            "tokenizer": str(self.questions.tokenizer.path),
            "data": self.questions.task.source,
            "limit": self.options.limit,
            "convention": self.options.convention,
            "bos": self.questions.bos,
            "dtype": self.dtype,
            "quantize": self.quantize or "none",
            "device": self.device.name,
            "replicas": self.grid.replicas,
            "stages": self.grid.stages,
            "tensor_parallel": self.grid.tensor_parallel,
            "micro_batch_tokens": self.scores.micro_batch_tokens,
        }

    def describe(self) -> None:
        """Print what a run would do."""
        if self.world.rank == 0:
            plan_of = (self.options, self.config, self.questions, self.split, self.grid)
            print_now(describe_plan(*plan_of, self.quantize) + "\n")

    def close(self) -> None:
        """End what an error may have left open."""
        super().close()
        if self.journal is not None:
            self.journal.close()
