"""What is to be continued: a prompt of the command line, a file of them, lines of a person."""

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cupyllama.errors import DataError
from cupyllama.tasks.question import shortened
from cupyllama.tokenizer import Tokenizer

_FORMS = "What is read: a prompt a line, or in a .jsonl file one JSON object a line with a prompt."


@dataclass(frozen=True)
class PromptText:
    """A text, and where it stands."""

    text: str
    place: str  # for messages


def read_prompts(path: Path) -> list[PromptText]:
    """The prompts of a file, in order: a line each, or by its name one JSON object a line.

    Raises:
        DataError: it cannot be read, or as `parse_prompts`.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "Give a file with --prompts.") from error
    return parse_prompts(raw, str(path), path.suffix == ".jsonl")


def parse_prompts(raw: bytes, name: str, is_json: bool = False) -> list[PromptText]:
    """The prompts that lines are, or have as JSON objects; `name` is what messages call them.

    Raises:
        DataError: there is none, or a line is not UTF-8, no such object, or empty.
    """
    read = _from_json if is_json else _as_it_is
    lines = _lines(name, raw.removeprefix(codecs.BOM_UTF8))
    prompts = [check_text(PromptText(read(line, place), place)) for line, place in lines]
    if not prompts:
        raise DataError(f"{name}: holds no prompts", _FORMS)
    return prompts


def check_text(prompt: PromptText) -> PromptText:
    """The prompt itself.

    Raises:
        DataError: it is empty, or holds what no tokenizer takes.
    """
    if not prompt.text.strip():
        raise DataError(f"{prompt.place}: the prompt is empty", "There is nothing to go on from.")
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{prompt.place}: the prompt has {prompt.text[error.start]!a}, which is no character",
            "Is it UTF-8? In JSON, write both halves of a surrogate pair, or neither.",
        ) from error
    return prompt


def tokenise(
    prompts: Sequence[PromptText],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    max_length: int,
    room: int | None = None,
) -> list[list[int]]:
    """Ids of each prompt, with BOS in front where the tokenizer puts it.

    Args:
        max_length: tokens that the model can see, the new ones among them.
        room: that a session has, where it is less; None: it has no such limit.

    Raises:
        DataError: a prompt does not leave room for `max_new_tokens`.
    """
    bos = [tokenizer.bos_token_id] if tokenizer.adds_bos else []
    rows = [[*bos, *ids] for ids in tokenizer.encode([prompt.text for prompt in prompts])]
    for prompt, row in zip(prompts, rows, strict=True):
        keys, left = len(row) + max_new_tokens, max_length - len(row)
        if keys > max_length:
            limit = f"the model's {max_length:,}"
            hint = f"Give --max-new-tokens {left} or fewer." if left > 0 else "Shorten the prompt."
        elif room is not None and keys > room:
            limit = f"the {room:,} that a session has room for"
            hint = f"Shorten it, or give it with --prompt: the model sees {max_length:,} tokens."
        else:
            continue
        raise DataError(
            f"{prompt.place}: the prompt {shortened(prompt.text)} has {len(row):,} tokens, and "
            f"with {max_new_tokens:,} new ones it would pass {limit}",
            hint,
        )
    return rows


def _lines(name: str, raw: bytes) -> Iterator[tuple[str, str]]:
    """Each line without its end, and its place; the file's last end of line begins no other."""
    lines = raw.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        place = f"{name}, line {number}"
        try:
            yield line.decode().removesuffix("\r"), place
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: not UTF-8 at byte {error.start}",
                "Convert the file: iconv -f ENCODING -t UTF-8.",
            ) from error


def _as_it_is(line: str, place: str) -> str:
    return line


def _from_json(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}", _FORMS) from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(
            f"{place}: has no prompt that is a text", 'Expected on every line: {"prompt": "…"}.'
        )
    return record["prompt"]
