"""Questions from a file, whichever of three forms it has, or from Hugging Face datasets."""

import bz2
import codecs
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from cupyllama.errors import DataError
from cupyllama.tasks import hellaswag
from cupyllama.tasks.question import Question, shortened

LINES_A_QUESTION = 6
FORMS = (
    "What is read: one JSON object a line (HellaSwag's own, or query, choices, gold), or six lines "
    "a question (context, index of the right ending, four endings); plain, gzip or bzip2."
)

# Compressed files by their first bytes, for names tell little: a suffix is lost, or kept by a
# program that decompresses on its way.
_COMPRESSED = {b"\x1f\x8b": ("gzip", gzip.decompress), b"BZh": ("bzip2", bz2.decompress)}
_UNREAD = {
    b"\xfd7zXZ\x00": ("xz-compressed", "Decompress it first: xz -d."),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", "Decompress it first: zstd -d."),
    b"PK\x03\x04": ("a zip archive", "Unpack it first: unzip."),
    b"PAR1": ("a Parquet file", FORMS),
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


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
    text = _decompress(path, raw).removeprefix(codecs.BOM_UTF8)
    if not text.strip():
        raise DataError(f"{path}: holds no questions", FORMS)
    if b"\0" in text[:4096] and not text.startswith(_UTF_16):
        raise DataError(f"{path}: is no text", FORMS)
    if text.lstrip()[:1] in (b"{", b"["):
        questions = list(_json_lines(path, text, convention))
        first = text.lstrip().split(b"\n", 1)[0]
        default = hellaswag.NAME if b'"endings"' in first else _stem(path)
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
        raise DataError(f"{path}: {error.strerror}", "Give a file with --data.") from error


def _decompress(path: Path, raw: bytes) -> bytes:
    for magic, (form, remedy) in _UNREAD.items():
        if raw.startswith(magic):
            raise DataError(f"{path}: is {form}, which is not read", remedy)
    for magic, (form, decompress) in _COMPRESSED.items():
        if raw.startswith(magic):
            try:
                return decompress(raw)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                raise DataError(
                    f"{path}: not a whole {form} file: {error}", "Is the download complete?"
                ) from error
    return raw


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
        except (ValueError, RecursionError) as error:
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
            f"{path}: not JSON, and {len(lines)} lines, which is no multiple of {LINES_A_QUESTION}",
            FORMS,
        )
    for first in range(0, len(lines), LINES_A_QUESTION):
        context, gold, *choices = lines[first : first + LINES_A_QUESTION]
        place = f"{path}, line {first + 2}"  # of the index, the one line that can be wrong
        yield _checked(place, hellaswag.question_from_lines, context, gold, choices, convention)


def _from_record(record: object, convention: str) -> Question:
    if not isinstance(record, dict):
        raise TypeError("not a JSON object")
    if hellaswag.is_record(record):
        question = hellaswag.question(record, convention)
        for number, ending in enumerate(record["endings"]):
            if ending and not question.choices[number]:  # lm-eval scores a lone space here
                raise ValueError(f"ending {number}, {shortened(ending)}, is empty after cleaning")
        return question
    query, choices, gold = record["query"], record["choices"], record["gold"]
    if not isinstance(query, str):
        raise TypeError("query is not a text")
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise TypeError("choices is not a list of texts")
    if not isinstance(gold, int) or isinstance(gold, bool):
        raise TypeError(f"gold is {shortened(gold)}, not a number")
    return Question(query, tuple(choices), gold)


def _checked(place: str, read: Callable[..., Question], *arguments: object) -> Question:
    """A question that can be scored, or a DataError that says where and why not."""
    try:
        question = read(*arguments)
    except KeyError as error:
        hint = (
            "lm-eval makes HellaSwag's context of ctx_a and ctx_b; ctx alone does for "
            "--convention fastertransformer."
            if str(error.args[0]).startswith("ctx")
            else "Expected query, choices, gold; or HellaSwag's activity_label, ctx_a, ctx_b, "
            "endings, label."
        )
        raise DataError(f"{place}: has no field {error.args[0]!r}", hint) from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: {error}", FORMS) from error
    if not question.choices:
        raise DataError(f"{place}: has no choices", "Every question needs one or more.")
    if not 0 <= question.gold < len(question.choices):
        label = shortened(question.gold)
        raise DataError(
            f"{place}: label {label} is out of range for {len(question.choices)} choices",
            "Labels count from 0.",
        )
    for number, choice in enumerate(question.choices):
        if not choice:
            raise DataError(f"{place}: choice {number} is empty", "A choice needs a text.")
    for text in (question.context, *question.choices):
        _check_unicode(place, text)
    return replace(question, place=place)


def _check_unicode(place: str, text: str) -> None:
    """JSON can say half a surrogate pair, which no tokenizer takes and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {shortened(text)} has {text[error.start]!a}, which is half a character",
            "Write both halves of the surrogate pair, or neither.",
        ) from error


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
