"""HellaSwag (Zellers et al. 2019): its records, and the text that each convention makes of them."""

import re
from typing import Any

from cupyllama.tasks.question import Question, shortened

NAME = "hellaswag"
DATASET = "Rowan/hellaswag"

_BRACKETS = re.compile(r"\[.*?\]")


def clean(text: str) -> str:
    """WikiHow's artefacts out of the text (lm-evaluation-harness, tasks/hellaswag/utils.py)."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


def is_record(record: dict[str, Any]) -> bool:
    """Whether a JSON object looks like one of HellaSwag's."""
    return "endings" in record


def question(record: dict[str, Any], convention: str) -> Question:
    """One record with `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label` as a question.

    lm-eval joins ctx_a and the capitalised ctx_b; the FasterTransformer fork takes `ctx` as it is
    and, cleaning ": " by itself, loses the space after the colon. A record without ctx_a and ctx_b
    is refused by lm-eval, and here: its `ctx` does not say which word to capitalise.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of the wrong kind.
    """
    label = _text(record, "activity_label")
    if convention == "fastertransformer":
        context = _text(record, "ctx") if "ctx" in record else _joined(record)
        context = clean(label) + clean(": ") + clean(context)
    else:
        ctx_a, ctx_b = _text(record, "ctx_a"), _text(record, "ctx_b").capitalize()
        context = clean(f"{label}: {ctx_a} {ctx_b}")
    endings = record["endings"]
    if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
        raise TypeError("endings is not a list of texts")
    return Question(context, tuple(clean(ending) for ending in endings), _label(record["label"]))


def question_from_lines(context: str, gold: str, choices: list[str], convention: str) -> Question:
    """The six-line text form, `label: context` on the first line, cleaned already.

    Raises:
        ValueError: the gold index is not a number.
    """
    if convention == "fastertransformer":
        context = context.replace(": ", ":", 1)
    return Question(context, tuple(choices), _label(gold))


def _joined(record: dict[str, Any]) -> str:
    return f"{_text(record, 'ctx_a')} {_text(record, 'ctx_b')}"


def _text(record: dict[str, Any], key: str) -> str:
    if not isinstance(record[key], str):
        raise TypeError(f"{key} is not a text")
    return record[key]


def _label(value: Any) -> int:
    """Labels are numbers, or numbers in quotes as Hugging Face's copy has them."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"label is {shortened(value)}, not a number")
    try:
        return int(value)
    except ValueError:
        hint = " (the test split has no labels)" if value == "" else ""
        raise ValueError(f"label is {shortened(value)}, not a number{hint}") from None
