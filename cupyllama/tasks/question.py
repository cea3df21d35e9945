"""One multiple-choice question."""

import reprlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """A context, and the choices that may continue it after a space."""

    context: str
    choices: tuple[str, ...]
    gold: int  # index of the right choice
    place: str = field(default="", compare=False)  # file and line, for messages


def shortened(value: object) -> str:
    """`value` as a message can show it, in some 60 characters at most."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)
