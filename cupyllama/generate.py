"""`cupyllama generate`: load, read prompts, answer them, print."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from cupyllama.errors import CupyllamaError, DataError, NotFiniteError, UsageError
from cupyllama.files import check_apart, check_writable, is_special, partial_of
from cupyllama.generation.answers import Answer, Pace, end_token_ids, follow
from cupyllama.generation.answers_file import AnswersFile, check_partial
from cupyllama.generation.beam import beam_search
from cupyllama.generation.console import line_editing, on_interrupt, read_line
from cupyllama.generation.engine import Engine, Prompt
from cupyllama.generation.prompts import (
    PromptText,
    check_text,
    parse_prompts,
    read_prompts,
    tokenise,
)
from cupyllama.generation.session import Session, SessionOptions, open_session
from cupyllama.generation.settings import SamplingSettings
from cupyllama.generation.text import check_stop_texts
from cupyllama.parallel.world import launched
from cupyllama.printing import note, print_now

# What the cache of a conversation has room for, at least, if the model sees as much: a model may
# see 131,072 tokens, of which a person's line has few.
LINE_TOKENS = 8192


@dataclass(frozen=True)
class GenerateOptions(SessionOptions):
    """What the command line asks for."""

    prompt: str | None = None
    prompts: Path | None = None  # neither: lines of stdin
    max_new_tokens: int = 128
    temperature: float | None = None  # None: 0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    beam_width: int | None = None
    stop_texts: tuple[str, ...] = ()
    batch_size: int = 32  # prompts that are answered at a time
    output: Path | None = None

    def sampling(self, number: int) -> SamplingSettings:
        """Of a prompt by its number: each draws from a seed of its own, whatever its company."""
        return SamplingSettings(
            temperature=self.temperature or 0.0,
            top_k=self.top_k or 0,
            top_p=self.top_p or 1.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=(self.seed or 0) + number,
        )


def generate(options: GenerateOptions) -> None:
    """Answer what there is to answer, together with the other ranks if a launcher started several.

    Raises:
        CupyllamaError: whatever the user can mend, each with its exit code.
    """
    remedy = ""
    if options.output is not None and not is_special(options.output):
        remedy = f"Answers that were whole, if any, are in {partial_of(options.output)}."
    with open_session(options, remedy) as session:
        run = Run(options, session)
        with session.world.together():
            run.read_prompts()
        run.share_prompts()
        if run.prompts is None:
            run.converse()
        else:
            run.answer_prompts()


class Run:
    """One rank's part. All ranks follow the same tokens, and rank 0 prints."""

    def __init__(self, options: GenerateOptions, session: Session):
        self.options, self.session, self.world = options, session, session.world
        self.prints = self.world.rank == 0
        self.prompts: list[PromptText] | None = None  # None: lines, as they come

    def read_prompts(self) -> None:
        """On rank 0, all prompts that are there already, and a look at what could end the run."""
        options = self.options
        check_stop_texts(options.stop_texts)
        options.sampling(0)  # refuses what is out of range
        self.eos_token_ids = end_token_ids(options.model, self.session.tokenizer)
        if not self.prints:
            return
        if options.prompt is not None:
            self.prompts = [check_text(PromptText(options.prompt, "--prompt"))]
        elif options.prompts is not None:
            self.prompts = read_prompts(options.prompts)
        elif self.world.size == 1 and not sys.stdin.isatty():
            if launched():
                self.session.say(
                    "reading stdin to its end, which Open MPI 5 keeps to itself: with that, give "
                    "--prompts FILE"
                )
            self.prompts = parse_prompts(sys.stdin.buffer.read(), "stdin")
        if options.output is not None:
            if self.prompts is None:
                raise UsageError(
                    "--output is for prompts that are there at the start",
                    "Give them with --prompt TEXT or --prompts FILE.",
                )
            read = {"--prompts": options.prompts, "--tokenizer": options.tokenizer}
            check_apart(read, {"--output": options.output})
            check_writable(options.output)
            check_partial(options.output)

    def share_prompts(self) -> None:
        """Rank 0's prompts, for all."""
        self.prompts = self.world.allgather(self.prompts)[0]

    def answer_prompts(self) -> None:
        """Every prompt; the texts of several are printed in order, unless they go to a file."""
        options = self.options
        with self.world.together():
            limit = self.session.config.max_length
            rows = tokenise(self.prompts, self.session.tokenizer, options.max_new_tokens, limit)
        longest = max(map(len, rows)) + options.max_new_tokens - 1
        count = options.beam_width or min(options.batch_size, len(rows))
        engine = self.session.engine(count, longest)
        alone = len(rows) == 1
        with self.world.alone():
            answers, pace = self.new_answers(len(rows)), Pace()
            came = self.answer(engine, self.prompts, rows, answers, pace)
            with self.kept(came, rows, answers) as came:
                if alone:
                    self.print_stream(came)
                else:
                    self.print_in_order(came, answers, pace)
                self.session.say(str(pace) if alone else f"{len(rows):,} prompts: {pace}")

    def converse(self) -> None:
        """A line, its answer, the next line, until there is none."""
        options, session, world = self.options, self.session, self.world
        limit = session.config.max_length
        room = min(limit, max(LINE_TOKENS, 2 * options.max_new_tokens))
        engine = session.engine(options.beam_width or 1, room)
        if world.size > 1:
            session.say(
                "each line is a prompt; Ctrl-C ends the session, and so does the end of stdin, "
                "which Open MPI 5 keeps to itself"
            )
        with world.alone(), line_editing() if self.prints else nullcontext():
            for number, line in enumerate(self.lines()):
                try:
                    prompt = check_text(PromptText(line, "this line"))
                    new_tokens = options.max_new_tokens
                    rows = tokenise([prompt], session.tokenizer, new_tokens, limit, room)
                except DataError as error:
                    self.say_error(error)
                    continue
                answers, pace = self.new_answers(1), Pace()
                with self.interruptible(engine):
                    came = self.answer(engine, [prompt], rows, answers, pace, number)
                    self.print_stream(came)
                session.say(str(pace))

    def lines(self) -> Iterator[str]:
        """The lines that rank 0 reads, on all ranks; empty ones are left out."""
        while True:
            line: str | DataError | None = None
            if self.prints:
                try:
                    line = read_line()
                except DataError as error:
                    line = error
            line = self.world.allgather(line)[0]
            if line is None:
                return
            if isinstance(line, DataError):
                self.say_error(line)
            elif line.strip():
                yield line

    def new_answers(self, count: int) -> list[Answer]:
        """As many, of which nothing has come."""
        tokenizer, stop_texts = self.session.tokenizer, self.options.stop_texts
        return [Answer(tokenizer, self.eos_token_ids, stop_texts) for _ in range(count)]

    def answer(
        self,
        engine: Engine,
        prompts: Sequence[PromptText],
        rows: Sequence[list[int]],
        answers: Sequence[Answer],
        pace: Pace,
        first: int = 0,
    ) -> Iterator[tuple[int, str]]:
        """The text of each prompt's answer, with its number, as it comes.

        Args:
            first: the number that decides the first one's draws.
        """
        find = self.sample if self.options.beam_width is None else self.search
        asked = [
            Prompt(
                row,
                self.options.max_new_tokens,
                self.options.sampling(number),
                self.eos_token_ids,
                prompt.place,
            )
            for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), first)
        ]
        try:
            yield from find(engine, asked, answers, pace)
        except NotFiniteError as error:
            with self.world.together():  # as all ranks find it, it is said once
                raise error

    def sample(
        self, engine: Engine, prompts: Sequence[Prompt], answers: Sequence[Answer], pace: Pace
    ) -> Iterator[tuple[int, str]]:
        """Token by token, prompts side by side."""
        yield from follow(engine, engine.generate(prompts), answers, pace)
        for number, answer in enumerate(answers):
            if answer.finish_reason is None:
                yield number, answer.interrupt()

    def search(
        self, engine: Engine, prompts: Sequence[Prompt], answers: Sequence[Answer], pace: Pace
    ) -> Iterator[tuple[int, str]]:
        """The likeliest text of each prompt; beams are its company, so one after the other."""
        width = self.options.beam_width
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            best, *_ = beam_search(
                *(engine.decoder, engine.pool, prompt.token_ids, width, prompt.max_new_tokens),
                *(prompt.eos_token_ids, prompt.name),
            )
            pace.count(len(best.token_ids))
            text = ""
            for place, token in enumerate(best.token_ids, 1):
                text += answer.put(token, place == len(best.token_ids))
                if answer.finish_reason is not None:
                    break
            yield number, text

    @contextmanager
    def interruptible(self, engine: Engine) -> Iterator[None]:
        """Ctrl-C ends an answer. Of several ranks it ends all: their launcher sees to that."""
        if self.world.size > 1:
            yield
        elif self.options.beam_width is None:
            with on_interrupt(engine.cancel):
                yield
        else:
            try:
                yield
            except KeyboardInterrupt:  # in a pass: the beams are given up
                print_now("\n")

    def print_stream(self, came: Iterator[tuple[int, str]]) -> None:
        """One answer, as it comes, and the end of its last line."""
        last = ""
        try:
            for _, text in came:
                if self.prints and text:
                    print_now(text)
                    last = text
        except BaseException:
            if last:
                print_now("\n")
            raise
        if self.prints and not last.endswith("\n"):
            print_now("\n")

    def print_in_order(
        self, came: Iterator[tuple[int, str]], answers: Sequence[Answer], pace: Pace
    ) -> None:
        """Prompts with their answers, each when it and all before it are whole.

        Where it is interrupted, also those that are whole behind one that is not.
        """
        from tqdm import tqdm

        printed = 0
        shown = self.prints and self.options.output is None

        def show(number: int) -> None:
            if shown:
                with tqdm.external_write_mode(file=sys.stdout):
                    text = f"{self.prompts[number].text}{answers[number].text}"
                    print_now(text + "\n" * (1 if text.endswith("\n") else 2))

        with tqdm(
            total=len(answers),
            unit="prompt",
            desc="generating",
            disable=None if self.session.is_printer else True,  # None: on a terminal only
        ) as bar:
            try:
                for number, _ in came:
                    if answers[number].finish_reason is None:
                        continue
                    bar.set_postfix_str(f"{pace.tokens:,} tokens", refresh=False)
                    bar.update()
                    while printed < len(answers) and answers[printed].finish_reason is not None:
                        show(printed)
                        printed += 1
            except KeyboardInterrupt:
                for number in range(printed, len(answers)):
                    if answers[number].finish_reason is not None:
                        show(number)
                raise

    @contextmanager
    def kept(
        self, came: Iterator[tuple[int, str]], rows: Sequence[list[int]], answers: Sequence[Answer]
    ) -> Iterator[Iterator[tuple[int, str]]]:
        """The same; --output has each answer once it is whole, and all in order at the end."""
        if not self.prints or self.options.output is None:
            yield came
            return
        file = AnswersFile(self.options.output, self.prompts, rows, answers)
        try:
            yield file.keep(came)
            file.finish()
        finally:
            left = file.close()
            if left is not None:
                self.session.say(left)

    def say_error(self, error: CupyllamaError) -> None:
        """As an error that ends a command, but it does not."""
        if self.prints:
            note(f"cupyllama: {error}")
            if error.hint:
                note(f"  {error.hint}")
