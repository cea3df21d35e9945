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
from cupyllama.files import lock, partial_of, unwritable


class Journal:
    """The answers of a run under way."""

    def __init__(self, samples: Path):
        self.path = partial_of(samples)
        self._samples = samples
        self._file: Any = None

    def check_unfinished(self) -> None:
        """Look before a run is resumed whether it has ended, and removed its journal.

        Raises:
            UsageError: it has. Whether with the same model, data and settings, nothing tells.
        """
        if not os.path.exists(self.path) and os.path.exists(self._samples):
            raise UsageError(
                f"{self._samples}: is finished, there is nothing to resume",
                "Leave --resume out to score everything again.",
            )

    def claim(self, resume: bool) -> None:
        """Have what an earlier run left, if it left a journal, for this process alone.

        Raises:
            UsageError: it has answers that would be lost, or is no journal, or another process is
                writing it.
        """
        if not os.path.exists(self.path):
            return
        self._open("r+b")
        lines, _ = self._read()
        if len(lines) > 1 and not resume:
            raise UsageError(
                f"{self.path}: has answers of a run that has not ended",
                "Go on with it by --resume, or delete it to score everything again.",
            )

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """A new journal, or one anew that was claimed.

        Raises:
            OutputError: it cannot be written.
            UsageError: there is one since nothing was found to claim.
        """
        if self._file is None:
            self._open("xb")
        self._file.seek(0)
        self._file.truncate()
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
            UsageError: the earlier run scored something else, and it says what differs; or a line
                has no answers.
        """
        lines, whole = self._read()
        for key in fingerprint:
            if lines[0].get(key) != fingerprint[key]:
                raise UsageError(
                    f"{self.path}: {key} was {_short(lines[0].get(key))} and is "
                    f"{_short(fingerprint[key])}",
                    "Resume with what the run was begun with, or delete it to start anew.",
                )
        for number, line in enumerate(lines[1:], 2):
            try:
                scores.put(
                    np.array(line["choices"], int),
                    np.array(line["loglikelihoods"], float),
                    np.array(line["is_greedy"], bool),
                )
            except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise self._foreign(number) from error
        if self._file is None:
            self._open("r+b")
        self._file.truncate(whole)
        self._file.seek(whole)
        return int(scores.done.sum())

    def settings(self) -> dict[str, Any] | None:
        """The first line, or None where there is nothing to resume."""
        if not os.path.isfile(self.path):
            return None
        lines, _ = self._read()
        return lines[0] if lines else None

    def append(self, scores: ChoiceScores, choices: np.ndarray) -> None:
        """Add the results of a micro-batch."""
        line = {
            "choices": choices.tolist(),
            "loglikelihoods": scores.loglikelihoods[choices].tolist(),
            "is_greedy": scores.is_greedy[choices].tolist(),
        }
        try:
            self._write(line)
        except OutputError as error:
            safe = "The answers before are safe: --resume goes on from there."
            raise OutputError(str(error), f"{error.hint} {safe}") from error

    def remove(self) -> None:
        """Nothing is left to resume."""
        self.path.unlink(missing_ok=True)  # before others may lock it
        self.close()

    def close(self) -> None:
        """Leave it for a later run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """Whole lines, and the bytes that they take; without one that a kill cut short.

        Raises:
            UsageError: a line that no run writes there.
        """
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from error
        lines, whole = [], 0
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n") and (lines or line.startswith(b"{")):
                break
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise self._foreign(number) from error
            whole += len(line)
        if lines and not (isinstance(lines[0], dict) and "micro_batch_tokens" in lines[0]):
            raise self._foreign(1)
        return lines, whole

    def _foreign(self, number: int) -> UsageError:
        return UsageError(
            f"{self.path}, line {number}: not what score writes there",
            "Move it or delete it to score everything again, or give another --samples.",
        )

    def _open(self, mode: str) -> None:
        try:
            self._file = open(self.path, mode, buffering=0)
            lock(self._file.fileno(), self.path)
        except FileExistsError as error:
            raise UsageError(
                f"{self.path}: another process has made it", "Wait for it, or end it."
            ) from error
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _write(self, line: dict[str, Any]) -> None:
        content = (json.dumps(line) + "\n").encode()
        try:
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error


def _short(value: Any) -> str:
    """Digests are long; their beginnings differ."""
    return repr(value[:12] + "…" if isinstance(value, str) and len(value) > 40 else value)
