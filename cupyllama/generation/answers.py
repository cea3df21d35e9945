"""Tokens that come from a model, by prompt: their text, why it ends, and how fast they come."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cupyllama.checkpoint.metaseq_parts import model_directory
from cupyllama.errors import ModelError
from cupyllama.generation.text import TextStream
from cupyllama.tokenizer import Tokenizer
from cupyllama.tokenizer_files import json_beside


def end_token_ids(model: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer.

    Those of generation_config.json, of which LLaMA 3 has several, else of config.json, else the
    tokenizer's own.

    Raises:
        ModelError: eos_token_id is neither a number nor a list of them.
    """
    for name in ("generation_config.json", "config.json"):
        path = model_directory(model) / name
        found = json_beside(path, name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(token_id) is int for token_id in ids):
                raise ModelError(
                    f"{path}: eos_token_id is {found!r}", "Expected: a number, or a list of them."
                )
            return frozenset(ids)
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


class Answer:
    """What a prompt is continued with, as far as it has come."""

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], stop_texts: Sequence[str]
    ):
        self._eos_token_ids = eos_token_ids
        self._stream = TextStream(tokenizer, stop_texts)
        self.text = ""
        self.tokens = 0  # sampled, those of a stop text and EOS among them
        self.finish_reason: str | None = None  # eos, stop, length; interrupted

    def put(self, token_id: int, is_last: bool) -> str:
        """The text that is certain with this token; sets finish_reason if it is the last."""
        assert self.finish_reason is None
        self.tokens += 1
        is_end = token_id in self._eos_token_ids
        text = "" if is_end else self._stream.put(token_id)
        if is_end or is_last:
            text += self._stream.end()
            self.finish_reason = "eos" if is_end else "length"
        if self._stream.stopped:
            self.finish_reason = "stop"
        self.text += text
        return text

    def interrupt(self) -> str:
        """No more is wanted: the text that was held back."""
        self.finish_reason = "interrupted"
        text = self._stream.end()
        self.text += text
        return text


@dataclass
class Pace:
    """How fast tokens come."""

    began: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    first: float = 0.0  # seconds until it came
    last: float = 0.0

    def count(self, tokens: int = 1) -> None:
        """So many more are there."""
        self.last = time.perf_counter() - self.began
        if not self.tokens:
            self.first = self.last
        self.tokens += tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.last if self.last else 0.0

    def __str__(self) -> str:
        """As the line that closes an answer has it."""
        count = "1 token" if self.tokens == 1 else f"{self.tokens:,} tokens"
        return (
            f"{count} in {self.last:.2f} s: {self.tokens_per_second:,.1f} tokens/s, "
            f"the first after {self.first:.3f} s"
        )


def follow(
    engine: Any, events: Iterable[Any], answers: Sequence[Answer], pace: Pace
) -> Iterator[tuple[int, str]]:
    """Give each answer its tokens, and end its sequence where its text ends.

    Args:
        events: of `engine.generate`, one sequence for each of `answers`.

    Yields:
        The number of an answer, and the text that has come with its token.
    """
    for event in events:
        answer = answers[event.number]
        pace.count()
        text = answer.put(event.token, event.finished)
        if answer.finish_reason is not None and not event.finished:
            engine.cancel(event.number)
        yield event.number, text
