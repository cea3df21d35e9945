"""Answers on disk: each as soon as it is whole, and all of them in order in the end.

`FILE.partial` lies beside the file while a run is under way, with a line for each answer, in the
order in which they ended. A run that ends early leaves it there, and no other writes over it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cupyllama.errors import UsageError
from cupyllama.files import is_special, lock, partial_of, unwritable, write_json_lines
from cupyllama.generation.answers import Answer
from cupyllama.generation.prompts import PromptText


def check_partial(path: Path) -> None:
    """Refuse before the run what would write over the answers of another.

    Raises:
        UsageError: FILE.partial has some.
    """
    partial = partial_of(path)
    if not is_special(path) and os.path.isfile(partial) and partial.stat().st_size:
        raise UsageError(
            f"{partial}: has answers of a run that has not ended",
            "Move it to keep them, or delete it; or give another --output.",
        )


class AnswersFile:
    """What --output names, for prompts, their token rows, and their answers."""

    def __init__(
        self,
        path: Path,
        prompts: Sequence[PromptText],
        rows: Sequence[Sequence[int]],
        answers: Sequence[Answer],
    ):
        self._path, self._prompts, self._rows, self._answers = path, prompts, rows, answers
        self._partial = partial_of(path)
        self._is_special = is_special(path)
        self._file: Any = None
        self._kept = 0

    def keep(self, came: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """The same numbers and texts; an answer is in FILE.partial before its last is handed on.

        Raises:
            OutputError: the disk is full, or the like.
        """
        for number, text in came:
            if self._answers[number].finish_reason is not None and not self._is_special:
                self._append(self._record(number))
            yield number, text

    def finish(self) -> None:
        """The file itself; FILE.partial is removed.

        Raises:
            OutputError: it cannot be written; FILE.partial has the answers.
        """
        write_json_lines(self._path, map(self._record, range(len(self._answers))))
        if self._kept:
            self._partial.unlink(missing_ok=True)
            self._kept = 0

    def close(self) -> str | None:
        """What there is to say of answers that only FILE.partial has."""
        if self._file is not None:
            self._file.close()
        if not self._kept:
            return None
        count = "1 answer" if self._kept == 1 else f"{self._kept:,} answers"
        return f"{self._partial} has {count} of {len(self._answers):,}"

    def _record(self, number: int) -> dict[str, Any]:
        answer = self._answers[number]
        return {
            "prompt": self._prompts[number].text,
            "text": answer.text,
            "prompt_tokens": len(self._rows[number]),
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
        }

    def _append(self, record: dict[str, Any]) -> None:
        """The first one of a run makes the file.

        Without fsync: it outlives this process, and waiting for the disk would take longer than the
        next tokens.
        """
        content = (json.dumps(record) + "\n").encode()
        try:
            if self._file is None:
                self._file = open(self._partial, "ab", buffering=0)
                lock(self._file.fileno(), self._partial)
                check_partial(self._path)  # another run may have begun it since
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            raise unwritable(self._partial, error) from error
        self._kept += 1
