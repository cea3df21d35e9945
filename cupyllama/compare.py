"""What changed since another run: its samples file against this run's answers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cupyllama.errors import DataError
from cupyllama.files import partial_of
from cupyllama.tasks.question import Question, shortened

if TYPE_CHECKING:
    from cupyllama.report import Answers

WANTED = "Give what `cupyllama score --samples` wrote."
SAME_DATA = "Compare runs of the same questions: is it of another --data or --task?"

# Accuracies that a samples file can tell, and its field with the choice picked for each.
PICKS = {"acc": "pred", "acc_norm": "pred_norm"}

# No sum of log-probabilities is further from 0; NaN and the infinities are outside too.
_LARGEST = 1e30


@dataclass(frozen=True)
class Sample:
    """One question as another run answered it."""

    line: int
    gold: int
    loglikelihoods: list[float]
    num_tokens: list[int]
    pred: int
    pred_norm: int


@dataclass(frozen=True)
class OtherRun:
    """A samples file."""

    path: Path
    samples: dict[int, Sample]  # by doc_id


@dataclass(frozen=True)
class PickChange:
    """Both runs' picks under one normalisation, over the questions compared."""

    before: float  # accuracy
    after: float
    flipped: int  # another choice is picked, be both of them wrong
    right_to_wrong: int
    wrong_to_right: int
    p_value: float


@dataclass(frozen=True)
class LoglikelihoodChange:
    """This run's log-likelihoods less the other's, over the choices compared."""

    choices: int
    mean: float
    mean_absolute: float
    largest: float  # in absolute value; with its sign
    largest_doc_id: int
    largest_choice: int
    other_num_tokens: int  # questions with a choice scored on another number of tokens


@dataclass(frozen=True)
class Comparison:
    """What changed from another run to this one."""

    path: Path
    questions: int  # that both have
    only_here: int
    only_there: int
    picks: dict[str, PickChange]  # by accuracy
    loglikelihoods: LoglikelihoodChange

    def as_json(self) -> dict[str, Any]:
        """Plain numbers under plain keys."""
        return asdict(self) | {"path": str(self.path)}

    def as_text(self) -> str:
        """A table, and a line on the log-likelihoods."""
        lines = [f"  compared with {self.path}: {_many(self.questions, 'question')}"]
        for count, where in [(self.only_here, "this run"), (self.only_there, "that one")]:
            if count:
                lines[0] += f"; {count:,} more in {where} alone"
        lines.append(
            f"  {'accuracy':<12}{'before':>7}{'after':>8}{'flipped':>9}{'right->wrong':>14}"
            f"{'wrong->right':>14}   p (McNemar)"
        )
        for name, pick in self.picks.items():
            lines.append(
                f"  {name:<12}{100 * pick.before:>7.2f}{100 * pick.after:>8.2f}"
                f"{pick.flipped:>9,}{pick.right_to_wrong:>14,}{pick.wrong_to_right:>14,}   "
                f"{pick.p_value:.3g}"
            )
        change = self.loglikelihoods
        what = f"  log-likelihoods of {_many(change.choices, 'choice')}: "
        if change.largest == 0:
            lines.append(f"{what}none changed")
        else:
            lines += [
                f"{what}changed by {change.mean:+.3g} on average, "
                f"{change.mean_absolute:.3g} in absolute value;",
                f"  most in question {change.largest_doc_id}, choice {change.largest_choice}: "
                f"{change.largest:+.3g}",
            ]
        if change.other_num_tokens:
            lines.append(
                f"  {_many(change.other_num_tokens, 'question')} scored on other numbers of "
                "tokens: another tokenizer or convention"
            )
        return "\n".join(lines)


def read_samples(path: Path) -> OtherRun:
    """Read what `score --samples` wrote in another run.

    Raises:
        DataError: nothing there, or a line that is not a sample: it names file and line.
    """
    samples: dict[int, Sample] = {}
    for number, line in enumerate(_read(path).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}", WANTED) from error
        if not samples and isinstance(record, dict) and "micro_batch_tokens" in record:
            raise DataError(
                f"{path}: is the journal of a run that has not ended",
                "Finish that run with --resume, and give its --samples file.",
            )
        try:
            doc_id, sample = _sample(number, record)
        except (KeyError, ValueError) as error:
            reason = f"has no field {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{place}: {reason}", WANTED) from error
        if doc_id in samples:
            raise DataError(
                f"{place}: doc_id {doc_id} was in line {samples[doc_id].line} already",
                "Is it more than one run's? Give each its own file.",
            )
        samples[doc_id] = sample
    if not samples:
        raise DataError(f"{path}: holds no samples", WANTED)
    return OtherRun(path, samples)


def check_questions(other: OtherRun, questions: Sequence[Question], asked: int) -> None:
    """Refuse a samples file of other questions than these, of which the first `asked` are scored.

    Raises:
        DataError: a question that is not there, or has other choices; or none in common.
    """
    for doc_id, sample in other.samples.items():
        place = f"{other.path}, line {sample.line}"
        if doc_id >= len(questions):
            raise DataError(
                f"{place}: doc_id {doc_id} is none of the {len(questions):,} questions", SAME_DATA
            )
        question = questions[doc_id]
        here = f"question {doc_id}" + (f" ({question.place})" if question.place else "")
        if len(sample.loglikelihoods) != len(question.choices):
            raise DataError(
                f"{place}: has {len(sample.loglikelihoods)} choices, and {here} has "
                f"{len(question.choices)}",
                SAME_DATA,
            )
        if sample.gold != question.gold:
            raise DataError(
                f"{place}: gold is {sample.gold}, and {question.gold} in {here}", SAME_DATA
            )
    first = min(other.samples)
    if first >= asked:
        raise DataError(
            f"{other.path}: begins with question {first}, and this run ends with {asked - 1}",
            f"Give a --limit of {first + 1} or more, or none.",
        )


def compare(other: OtherRun, answers: "Answers") -> Comparison:
    """The questions of both, which `check_questions` has found to be the same ones."""
    questions = len(answers.questions)
    common = sorted(doc_id for doc_id in other.samples if doc_id < questions)
    samples = [other.samples[doc_id] for doc_id in common]
    gold = np.array([sample.gold for sample in samples])
    picks = {}
    for name, field in PICKS.items():
        before = np.array([getattr(sample, field) for sample in samples])
        picks[name] = _pick_change(before, answers.picks[name][common], gold)
    return Comparison(
        path=other.path,
        questions=len(common),
        only_here=questions - len(common),
        only_there=len(other.samples) - len(common),
        picks=picks,
        loglikelihoods=_loglikelihood_change(common, samples, answers),
    )


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact two-sided McNemar test: how likely chance alone is to be as one-sided as this.

    If both runs are equally good, each question that only one of them has right is the toss of a
    fair coin. Whole numbers up to the one division: 0.1 s for 30,000 such questions.
    """
    tosses = right_to_wrong + wrong_to_right
    ways = total = 1  # of 0 heads; of at most as many as were seen
    for heads in range(1, min(right_to_wrong, wrong_to_right) + 1):
        ways = ways * (tosses - heads + 1) // heads
        total += ways
    return min(1.0, 2 * total / 2**tosses)  # with equal numbers the middle is in both tails


def _pick_change(before: np.ndarray, after: np.ndarray, gold: np.ndarray) -> PickChange:
    was_right, is_right = before == gold, after == gold
    right_to_wrong = int((was_right & ~is_right).sum())
    wrong_to_right = int((~was_right & is_right).sum())
    return PickChange(
        before=float(was_right.mean()),
        after=float(is_right.mean()),
        flipped=int((before != after).sum()),
        right_to_wrong=right_to_wrong,
        wrong_to_right=wrong_to_right,
        p_value=mcnemar(right_to_wrong, wrong_to_right),
    )


def _loglikelihood_change(
    common: Sequence[int], samples: Sequence[Sample], answers: "Answers"
) -> LoglikelihoodChange:
    starts = answers.choice_start
    places = [(doc, place) for doc in common for place in range(starts[doc], starts[doc + 1])]
    before = np.array([value for sample in samples for value in sample.loglikelihoods])
    tokens_before = np.array([count for sample in samples for count in sample.num_tokens])
    doc_ids, choices = np.array(places).T
    change = answers.loglikelihoods[choices] - before
    largest = int(np.argmax(np.abs(change)))
    return LoglikelihoodChange(
        choices=len(change),
        mean=float(change.mean()),
        mean_absolute=float(np.abs(change).mean()),
        largest=float(change[largest]),
        largest_doc_id=int(doc_ids[largest]),
        largest_choice=int(choices[largest] - starts[doc_ids[largest]]),
        other_num_tokens=len(set(doc_ids[answers.num_tokens[choices] != tokens_before].tolist())),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        journal = partial_of(path)
        hint = WANTED
        if isinstance(error, FileNotFoundError) and journal.is_file():
            hint = f"{journal} is of a run that has not ended: finish it with --resume."
        raise DataError(f"{path}: {error.strerror}", hint) from error


def _sample(line: int, record: object) -> tuple[int, Sample]:
    """The doc_id, and what is compared of a line; KeyError or ValueError where it has it not."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    loglikelihoods, num_tokens = record["loglikelihoods"], record["num_tokens"]
    if not isinstance(loglikelihoods, list) or not loglikelihoods:
        raise ValueError("loglikelihoods is not a list of numbers")
    for value in loglikelihoods:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) < _LARGEST:
            raise ValueError(f"{shortened(value)} is no log-likelihood")
    count = len(loglikelihoods)
    if not isinstance(num_tokens, list) or len(num_tokens) != count:
        raise ValueError(f"num_tokens is not a list of {count} numbers, as loglikelihoods is")
    for value in num_tokens:
        _whole("num_tokens", value, None)
    indices = {key: _whole(key, record[key], count) for key in ("gold", *PICKS.values())}
    doc_id = _whole("doc_id", record["doc_id"], None)
    return doc_id, Sample(line, loglikelihoods=loglikelihoods, num_tokens=num_tokens, **indices)


def _whole(key: str, value: object, end: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key} is {shortened(value)}, not a number from 0 on")
    if end is not None and value >= end:
        raise ValueError(f"{key} is {shortened(value)}, and there are {end} choices")
    return value


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
