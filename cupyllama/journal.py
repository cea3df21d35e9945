"""Answers on disk as they come, so that a run that ended early can go on.

`FILE.partial` lies beside the samples file while a run is under way: a line that says what is being
scored, then a line a micro-batch. Each is on the disk before the next micro-batch is waited for; a
line cut short by a kill is as if it were not there.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.errors import OutputError, UsageError
from cupyllama.evaluate import ChoiceScores


class Journal:
    """The answers of a run under way."""

    def __init__(self, samples: Path):
        self.path = samples.with_name(f"{samples.name}.partial")
        self._file: Any = None

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """A new journal; an old one is lost."""
        self._open("wb")
        try:
            self._write(fingerprint)
        except OutputError:
            self.remove()
            raise

    def resume(self, fingerprint: dict[str, Any], scores: ChoiceScores) -> int:
        """Put what an earlier run found into `scores`, and go on behind it.

        Returns:
            How many choices were there.

        Raises:
            UsageError: the earlier run scored something else; it says what differs.
        """
        lines, whole = self._read()
        for key in fingerprint:
            if lines[0].get(key) != fingerprint[key]:
                raise UsageError(
                    f"{self.path}: {key} was {_short(lines[0].get(key))} and is "
                    f"{_short(fingerprint[key])}",
                    "Resume with what the run was begun with, or start anew without --resume.",
                )
        for line in lines[1:]:
            choices = np.array(line["choices"], int)
            scores.put(choices, np.array(line["loglikelihoods"]), np.array(line["is_greedy"], bool))
        self._open("r+b")
        self._file.truncate(whole)
        self._file.seek(whole)
        return int(scores.done.sum())

    def settings(self) -> dict[str, Any] | None:
        """The first line, or None where there is nothing to resume."""
        if not self.path.is_file():
            return None
        lines, _ = self._read()
        return lines[0] if lines else None

    def append(self, scores: ChoiceScores, choices: np.ndarray) -> None:
        """Add the results of a micro-batch."""
        self._write(
            {
                "choices": choices.tolist(),
                "loglikelihoods": scores.loglikelihoods[choices].tolist(),
                "is_greedy": scores.is_greedy[choices].tolist(),
            }
        )

    def remove(self) -> None:
        """Nothing is left to resume."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave it for a later run."""
        if self._file is not None:
            self._file.close()

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """Whole lines, and the bytes that they take."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from error
        lines, whole = [], 0
        for line in content.splitlines(keepends=True):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                lines.pop()
                break
            whole += len(line)
        return lines, whole

    def _open(self, mode: str) -> None:
        try:
            self._file = open(self.path, mode, buffering=0)
        except OSError as error:
            raise self._failure(error) from error

    def _write(self, line: dict[str, Any]) -> None:
        content = (json.dumps(line) + "\n").encode()
        try:
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: cannot be written: {error.strerror}", "Is there space left on the disk?"
        )


def _short(value: Any) -> str:
    """Digests are long; their beginnings differ."""
    return repr(value[:12] + "…" if isinstance(value, str) and len(value) > 40 else value)
