"""One multiple-choice question."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A context, and the choices that may continue it after a space."""

    context: str
    choices: tuple[str, ...]
    gold: int  # index of the right choice
