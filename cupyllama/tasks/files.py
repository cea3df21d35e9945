"""Questions from a file, whichever of three forms it has, or from Hugging Face datasets."""

import bz2
import gzip
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cupyllama.errors import DataError
from cupyllama.tasks import hellaswag
from cupyllama.tasks.question import Question

LINES_A_QUESTION = 6


@dataclass(frozen=True)
class Task:
    """The questions of one benchmark, and where they came from."""

    name: str
    questions: list[Question]
    source: str
    digest: str  # SHA-256 of the file as it lies on disk


def demo_directory() -> Path:
    """The packaged demo: a small model, its tokenizer, and questions.jsonl."""
    return Path(str(resources.files("cupyllama.tasks") / "demo"))


def load_task(path: Path | None, convention: str, name: str | None = None) -> Task:
    """Read the questions at `path`, or HellaSwag's validation split where there is no path.

    Raises:
        DataError: nothing there, or a line that is not a question: it names file and line.
    """
    if path is None:
        return _load_dataset(convention, name)
    raw = _read(path)
    text = _decompress(path, raw)
    if not text.strip():
        raise DataError(f"{path}: holds no questions")
    if text.lstrip()[:1] in (b"{", b"["):
        questions = list(_json_lines(path, text, convention))
        default = hellaswag.NAME if b'"endings"' in text.split(b"\n", 1)[0] else _stem(path)
    else:
        questions = list(_six_lines(path, text, convention))
        default = hellaswag.NAME
    return Task(name or default, questions, str(path), hashlib.sha256(raw).hexdigest())


def first_questions(questions: Sequence[Question], limit: float | None) -> list[Question]:
    """The first `limit` questions; below 1 it is a fraction, rounded up, as in lm-eval."""
    if limit is None:
        return list(questions)
    return list(questions[: math.ceil(len(questions) * limit) if limit < 1 else int(limit)])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a directory", "--data takes a file.") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _decompress(path: Path, raw: bytes) -> bytes:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(raw)
        return bz2.decompress(raw) if path.suffix == ".bz2" else raw
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: not a whole {path.suffix} file: {error}", "Is the download complete?"
        ) from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".bz2").rsplit(".", 1)[0]


def _lines(path: Path, text: bytes) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1."""
    for number, line in enumerate(text.split(b"\n"), 1):
        try:
            yield number, line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 at byte {error.start}",
                "Convert the file: iconv -f ENCODING -t UTF-8.",
            ) from error


def _json_lines(path: Path, text: bytes, convention: str) -> Iterator[Question]:
    for number, line in _lines(path, text):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error}", "One JSON object a line is expected."
            ) from error
        yield _checked(f"{path}, line {number}", _from_record, record, convention)


def _six_lines(path: Path, text: bytes, convention: str) -> Iterator[Question]:
    lines = [line for _, line in _lines(path, text)]
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) % LINES_A_QUESTION:
        raise DataError(
            f"{path}: {len(lines)} lines, which is no multiple of {LINES_A_QUESTION}",
            "A question is six lines: context, index of the right ending, four endings.",
        )
    for first in range(0, len(lines), LINES_A_QUESTION):
        context, gold, *choices = lines[first : first + LINES_A_QUESTION]
        place = f"{path}, line {first + 2}"  # of the index, the one line that can be wrong
        yield _checked(place, hellaswag.question_from_lines, context, gold, choices, convention)


def _from_record(record: object, convention: str) -> Question:
    if not isinstance(record, dict):
        raise TypeError("not a JSON object")
    if hellaswag.is_record(record):
        return hellaswag.question(record, convention)
    query, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(query, str):
        raise TypeError("query is not a text")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise TypeError("choices is not a list of texts")
    if not isinstance(gold, int) or isinstance(gold, bool):
        raise TypeError(f"gold is {gold!r}, not a number")
    return Question(query, tuple(choices), gold)


def _checked(place: str, read: Callable[..., Question], *arguments: object) -> Question:
    """A question that can be scored, or a DataError that says where and why not."""
    try:
        question = read(*arguments)
    except KeyError as error:
        raise DataError(
            f"{place}: has no field {error.args[0]!r}",
            "Expected query, choices, gold; or HellaSwag's activity_label, ctx_a, ctx_b, endings, "
            "label.",
        ) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: {error}") from error
    if not question.choices:
        raise DataError(f"{place}: has no choices")
    if not 0 <= question.gold < len(question.choices):
        raise DataError(
            f"{place}: label {question.gold} is out of range for {len(question.choices)} choices"
        )
    for number, choice in enumerate(question.choices):
        if not choice:
            raise DataError(f"{place}: choice {number} is empty")
    return question


def _load_dataset(convention: str, name: str | None) -> Task:
    if name not in (None, hellaswag.NAME):
        raise DataError(
            f"task {name!r} is not known", f"Give its questions with --data, or {hellaswag.NAME}."
        )
    try:
        import datasets

        records = datasets.load_dataset(hellaswag.DATASET, split="validation")
    except Exception as error:  # offline, refused, a broken cache: each has a type of its own
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise DataError(
            f"{hellaswag.DATASET} could not be loaded: {reason}",
            "Offline? Give a copy with --data FILE.jsonl: hellaswag_val.jsonl from "
            "github.com/rowanz/hellaswag will do.",
        ) from error
    sha = hashlib.sha256()
    questions = []
    for number, record in enumerate(records):
        sha.update(json.dumps(record, sort_keys=True).encode())
        place = f"{hellaswag.DATASET}, record {number}"
        questions.append(_checked(place, _from_record, record, convention))
    return Task(hellaswag.NAME, questions, hellaswag.DATASET, sha.hexdigest())
